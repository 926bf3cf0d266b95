"""Expert editing: change what one expert contributes to one output (arXiv 2402.12550).

A layer returns ``y = sum_n a_n c_n(x)``; an edit replaces ``c_n(x)_o`` by ``scale · c_n(x)_o``, by
``c_n(x)_o + add`` or by 0, and leaves the decision ``a_n`` alone. It is made in the weights: an
edited model is an ordinary one, with an ordinary checkpoint and nothing more to compute.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.editing.edit import Edit
from mmdet_moe.moe.editing.factorised import FactorisedExpert
from mmdet_moe.moe.editing.sparse import SparseExpert
from mmdet_moe.moe.expert_layer import ExpertLayer, find_expert_layers
from mmdet_moe.moe.mumoe import MuMoE

__all__ = ['Edit', 'apply_edits', 'edit_experts']


@contextmanager
def edit_experts(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """The model with edits, until the end of the block; then its weights are bitwise as before.

    Args:
        model: Any model with layers of experts.
        edits: Made one after the other; several on the same expert compose.

    Raises:
        ConfigError: As :func:`apply_edits`.
    """
    with ExitStack() as undo:
        _apply(model, edits, undo)
        yield model


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Edit a model for good.

    μMoE layers: exact, by terms of rank one (:class:`FactorisedExpert`). A state dict with the
    higher rank loads into the model of the same config.

    Sparse experts: a row of the expert's last linear layer, convolution or affine normalisation is
    changed. The outcome is compared on random inputs, for what follows that layer decides whether
    the edit is exact: after a ReLU a contribution can be scaled by what is not negative, but
    nothing can be added to it.

    Args:
        model: As for :func:`edit_experts`; left as it was if an error is raised.
        edits: As for :func:`edit_experts`.

    Raises:
        ConfigError: If there is no such layer, expert or output, or the expert is built in a way
            that its weights cannot express the edit.
    """
    with ExitStack() as undo:
        _apply(model, edits, undo)
        undo.pop_all()


@torch.inference_mode(False)  # the weights may be trained later
@torch.no_grad()
def _apply(model: nn.Module, edits: Iterable[Edit], undo: ExitStack) -> None:
    edits = list(edits)
    layers = find_expert_layers(model)
    handles = [_find(model, layers, edit) for edit in edits]  # all are checked before any is made
    for edit, handle in zip(edits, handles, strict=True):
        handle.apply(edit, undo)


def _find(
    model: nn.Module, layers: dict[str, ExpertLayer], edit: Edit
) -> SparseExpert | FactorisedExpert:
    """What an edit is about.

    Raises:
        ConfigError: If there is no such thing in the model.
    """
    if edit.layer not in layers:
        close = difflib.get_close_matches(edit.layer, list(layers), cutoff=0.4) or list(layers)[:8]
        there = f'there is {", ".join(close)}' if close else f'{type(model).__name__} has none'
        raise ConfigError(f'Edit: no layer "{edit.layer}" has experts; {there}')
    layer = layers[edit.layer]
    if edit.expert >= layer.num_experts:
        raise ConfigError(
            f'Edit of layer "{edit.layer}": expert={edit.expert} is out of range; it has '
            f'{layer.num_experts} experts, from 0'
        )
    handle: SparseExpert | FactorisedExpert
    if isinstance(layer, MuMoE):
        handle = FactorisedExpert(layer, edit.expert)
    else:
        handle = SparseExpert(model, layer, edit.expert)
    if edit.output is not None and edit.output >= handle.num_outputs:
        raise ConfigError(
            f'Edit of layer "{edit.layer}": output={edit.output} is out of range; an expert has '
            f'{handle.num_outputs} outputs, from 0'
        )
    return handle
