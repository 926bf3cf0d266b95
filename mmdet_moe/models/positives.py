"""Decisions of a detection head that count as many positive anchors as they cover.

A head assigns anchors to objects in its ``get_targets``, after the layers have decided. This is the
one seam at which what only a toolbox's class knows reaches a layer's balancing.
"""

import inspect
from typing import Any

import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer


class CountPositives:
    """Stands in for ``get_targets`` of a head, and weighs the decisions of its layers.

    Args:
        head: A head with a method ``get_targets`` that returns, among others, one int64 tensor
            (N, anchors) of labels for each level, as those of MMDetection's anchor heads do.
        layers: The layers, each called with the maps of all levels, in their order.
    """

    def __init__(self, head: nn.Module, layers: list[MoELayer]) -> None:
        self.head = head
        self.layers = layers

    def __call__(self, *args: Any, **kwargs: Any) -> tuple:
        """What the head's own method returns."""
        targets = type(self.head).get_targets(self.head, *args, **kwargs)
        # One tensor per level, which is the order of a routing's items.
        labels = next((part for part in targets or () if _is_labels_of_levels(part)), None)
        if labels is None and targets is not None:
            raise ConfigError(
                f"decision_weight='positives': {type(self.head).__name__} does not tell the labels "
                "of its anchors level by level; use 'uniform' or 'area'"
            )
        for layer in self.layers if labels is not None else ():
            is_object = [(lab >= 0) & (lab < self.head.num_classes) for lab in labels]
            # Those of the latest call: the pass may hold others, each with targets of its own.
            pairs = zip(layer.items[-len(is_object) :], is_object, strict=True)
            layer.weigh_decisions(torch.cat([items.total(positive) for items, positive in pairs]))
        return targets


def _is_labels_of_levels(part: Any) -> bool:
    return isinstance(part, list | tuple) and all(
        isinstance(level, torch.Tensor) and level.dtype == torch.int64 and level.dim() == 2
        for level in part
    )


def _asks_for_targets(head: type) -> bool:
    """Whether the code of a head's loss names ``get_targets``, in its parents' where it asks them.

    A layer would wait for its weights in vain otherwise.
    """
    for cls in head.__mro__:
        if (loss := vars(cls).get('loss_by_feat')) is not None:
            names = inspect.unwrap(loss).__code__.co_names
            if 'get_targets' in names or 'super' not in names:
                return 'get_targets' in names
    return False


def count_positives(model: nn.Module) -> None:
    """Attach the heads of a model to those of their layers that count positives.

    Raises:
        ConfigError: If such a layer lies in no head that assigns anchors level by level, or its
            loss does not ask ``get_targets`` for them.
    """
    heads = {n: m for n, m in model.named_modules() if hasattr(type(m), 'get_targets')}
    waiting = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, MoELayer) and layer.decision_weight == 'positives'
    }
    for name, layer in waiting.items():
        inside = [h for h in heads if not h or name.startswith(h + '.')]
        head = heads[max(inside, key=len)] if inside else None
        if head is None or not hasattr(head, 'prior_generator') or layer.granularity == 'token':
            raise ConfigError(
                f'"{name}": decision_weight=\'positives\' needs a layer that decides on maps, in '
                'a head that assigns anchors level by level (an AnchorHead); use decision_weight='
                "'uniform' or 'area'"
            )
        if not _asks_for_targets(type(head)):
            raise ConfigError(
                f'"{name}": decision_weight=\'positives\' counts what `get_targets` assigns, which '
                f"the loss of {type(head).__name__} does not call; use decision_weight='uniform' "
                "or 'area'"
            )
        counter = vars(head).get('get_targets')
        if not isinstance(counter, CountPositives):
            vars(head)['get_targets'] = CountPositives(head, [layer])
        elif layer not in counter.layers:  # A preset has attached its own already.
            counter.layers.append(layer)
