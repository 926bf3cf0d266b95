"""Adds the soft constraints of all MoE layers to the losses of any model."""

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdet_moe.engine.hooks.layers import moe_layers_of, sources_of, unwrapped_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import BalancingLoss, DatasetLoss
from mmdet_moe.registry import HOOKS, MODELS

_PASS = 'BalancingLossHook'


@HOOKS.register_module()
class BalancingLossHook(Hook):
    """Adds ``loss_moe_<layer>`` entries to the loss dict while training.

    Works for every model whose ``forward(..., mode='loss')`` returns a dict, with or without
    distributed wrappers. A layer pays once for all its calls in that forward pass, such as those of
    several views, or of the labelled and the unlabelled images of a semi-supervised detector.

    Args:
        loss: Config of one :class:`~mmdet_moe.moe.BalancingLoss`, or a list of them. With several,
            each entry also carries the name of its loss, and a number if a name repeats. Those of
            several data sets (:class:`~mmdet_moe.moe.DatasetLoss`) get the image's from
            ``dataset_source`` in the metainfo of its data sample, which
            :class:`~mmdet_moe.datasets.JointDataset` puts there, and their number from it.
        layers: Glob patterns of the names of the MoE layers (``'backbone.*'``) that pay; all by
            default.

    Raises:
        ConfigError: For an empty list, and at the start of training if no MoE layer matches one of
            the patterns, or if one that matches is frozen, or a loss is for another number of data
            sets than the training has; in the first iteration if a loss needs the data set of an
            image that does not tell it; with several ranks if one of them does not run the layer.
    """

    def __init__(self, loss: dict | Sequence[dict], layers: str | Sequence[str] = '*') -> None:
        configs = [loss] if isinstance(loss, dict) else list(loss or ())
        if not configs:
            raise ConfigError('BalancingLossHook: loss is empty; give a loss or remove the hook')
        self.losses = [MODELS.build(config) for config in configs]
        for built in self.losses:
            if not isinstance(built, BalancingLoss):
                raise ConfigError(
                    f'BalancingLossHook: {type(built).__name__} is no balancing loss of mmdet_moe'
                )
        self.patterns = [layers] if isinstance(layers, str) else list(layers)
        self._handles: list[RemovableHandle] = []

    def covers(self, layer_name: str) -> bool:
        """Whether the layer of that name pays."""
        return any(fnmatch(layer_name, pattern) for pattern in self.patterns)

    def balances(self, layer_name: str) -> bool:
        """Whether the losses keep all experts of that layer in use."""
        return self.covers(layer_name) and any(
            loss.balances and loss.weight > 0 for loss in self.losses
        )

    def before_train(self, runner: Runner) -> None:
        """Attach the losses to the model."""
        layers = moe_layers_of(runner, self)
        names = [name for name in layers if self.covers(name)]
        for pattern in self.patterns or ['']:
            if not any(fnmatch(name, pattern) for name in layers):
                raise ConfigError(
                    f'BalancingLossHook: layers: {pattern!r} matches none of the MoE layers '
                    f'{list(layers)}'
                )
        for name in names:
            if not any(p.requires_grad for p in layers[name].router.parameters()):
                raise ConfigError(
                    f'BalancingLossHook: MoE layer "{name}" is frozen, so that its loss would do '
                    'nothing; unfreeze it, or leave it out with layers=[...]'
                )
        for loss in self.losses:
            if isinstance(loss, DatasetLoss):
                joined = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('sources')
                loss.tell_sources(joined and len(joined))
        model, add = unwrapped_model(runner), _AddLosses(self.losses, names)
        self._handles = [
            model.register_forward_pre_hook(add.begin, with_kwargs=True),
            model.register_forward_hook(add, with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Detach them again."""
        for handle in self._handles:
            handle.remove()


class _AddLosses:
    """The forward hook. A plain object without references to the model: copies and pickles well."""

    def __init__(self, losses: list[BalancingLoss], layer_names: list[str]) -> None:
        self.losses = losses
        self.layer_names = layer_names

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The losses are those of all that a layer decides here, in however many calls."""
        if _is_loss(args, kwargs):
            for name in self.layer_names:
                model.get_submodule(name).begin(_PASS)

    def __call__(
        self, model: nn.Module, args: tuple, kwargs: dict, output: dict[str, Tensor]
    ) -> dict[str, Tensor] | None:
        if not _is_loss(args, kwargs):
            return None
        for name in self.layer_names:
            layer = model.get_submodule(name)
            layer.end(_PASS)
            if not layer.has_run:  # as a head without a positive RoI
                if get_world_size() > 1:  # where others wait for this rank's share of the loss
                    raise ConfigError(
                        f'BalancingLossHook: MoE layer "{name}" was not run in this iteration of '
                        'one rank, so that its loss cannot be that of all ranks; leave it out with '
                        'layers=[...]'
                    )
                continue
            routing = layer.routing
            has_choice = routing.num_experts > 1
            if has_choice and torch.is_grad_enabled() and not routing.logits.requires_grad:
                raise ConfigError(
                    f'BalancingLossHook: the decisions of MoE layer "{name}" were made without a '
                    'gradient, as inside a reentrant activation checkpoint (with_cp=True), so that '
                    'its loss would do nothing; set with_cp=False there, or choose a layer that '
                    'holds the checkpoint (a whole stage)'
                )
            if any(loss.needs_sources for loss in self.losses):
                samples = kwargs.get('data_samples', (*args, None, None)[1])
                routing.sources = _sources(samples, name, routing.num_images)
            key = 'loss_moe_' + name.replace('.', '_')
            for loss in self.losses:
                suffix = f'_{type(loss).__name__}' if len(self.losses) > 1 else ''
                output[_free_key(output, key + suffix)] = loss(routing)
        return output


def _is_loss(args: tuple, kwargs: dict) -> bool:
    # BaseModel.forward(inputs, data_samples, mode)
    return 'loss' in (kwargs.get('mode'), *args[2:3])


def _sources(samples: object, name: str, num_images: int) -> tuple[int, ...]:
    """The data set of each image of a batch."""
    found = sources_of(samples)
    if found is None:
        raise ConfigError(
            'BalancingLossHook: DatasetLoss needs `dataset_source` in the metainfo of every data '
            'sample; join the data sets by mmdet_moe.JointDataset'
        )
    if len(found) != num_images:
        inputs = f'{num_images} inputs' if num_images > 0 else 'calls with unlike numbers of inputs'
        raise ConfigError(
            f'BalancingLossHook: MoE layer "{name}" decides on {inputs} of its own and '
            f'not on the {len(found)} images, so that DatasetLoss cannot tell their data sets; '
            'leave it out with layers=[...]'
        )
    return found


def _free_key(output: dict, key: str) -> str:
    """``key``, numbered if two losses of one class, or two hooks, would share it."""
    number, free = 1, key
    while free in output:
        number += 1
        free = f'{key}_{number}'
    return free
