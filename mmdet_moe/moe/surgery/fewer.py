"""Fewer experts in a trained model: fewer of them kept, or fewer of them chosen."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.layer import MoELayer, find_moe_layers


def keep_experts(layer: MoELayer, kept: Sequence[int], smaller: MoELayer) -> None:
    """Give a layer with fewer experts the weights of those that are kept, and their routing.

    Whatever there is for each expert goes along: its row of the router and of the noise, and its
    part of the state of a constraint. Items none of whose chosen experts are removed are computed
    as before, where their weights go by the chosen experts alone (``softmax='over_chosen'``).

    Args:
        layer: The layer.
        kept: Indices of its experts, ascending.
        smaller: A layer of ``len(kept)`` experts, built as the other one otherwise; it is changed.

    Raises:
        ConfigError: If the layers differ in more than their experts.
    """
    old, state = layer.state_dict(), {}
    for name, value in smaller.state_dict().items():
        source = name
        if name.startswith('experts.') and isinstance(layer.experts, nn.ModuleList):
            _, number, rest = name.split('.', 2)
            source = f'experts.{kept[int(number)]}.{rest}'
        found = old.get(source)
        if found is not None:
            sizes = (layer.num_experts, len(kept))
            for axis, pair in enumerate(zip(found.shape, value.shape, strict=False)):
                if pair == sizes:
                    found = found.index_select(axis, torch.tensor(kept, device=found.device))
        if found is None or found.shape != value.shape:
            raise ConfigError(
                f'layer "{layer.name}" cannot lose experts: what "{source}" holds is not one part '
                'for each of them'
            )
        state[name] = found
    smaller.load_state_dict(state)
    if smaller.router.constraint is not None:
        smaller.router.constraint.renormalise()


def set_top_k(model: nn.Module, top_k: int | Mapping[str, int]) -> dict[str, int]:
    """Choose another number of experts for each item, in the sparse layers of a trained model.

    The order of softmax and choice stays: with ``'over_chosen'`` the weights of an item sum to 1
    for any number, which a config with another ``top_k`` need not have.

    Args:
        model: Changed in place; for evaluation, as k = 1 may leave a router without a gradient.
        top_k: k of all layers with several experts, or by layer.

    Returns:
        What k was, by layer.

    Raises:
        ConfigError: If there are no such layers, or one has fewer experts; nothing is changed then.
    """
    layers = {name: m for name, m in find_moe_layers(model).items() if m.num_experts > 1}
    if not layers:
        raise ConfigError('top_k: the model has no sparse experts among which to choose')
    numbers = top_k if isinstance(top_k, Mapping) else dict.fromkeys(layers, top_k)
    for name, number in numbers.items():
        if name not in layers:
            raise ConfigError(f'top_k: there is no layer "{name}"; there is {", ".join(layers)}')
        if not 1 <= number <= layers[name].num_experts:
            raise ConfigError(
                f'top_k={number} must lie between 1 and {layers[name].num_experts}, the experts of '
                f'layer "{name}"'
            )
    before = {name: layers[name].top_k for name in numbers}
    for name, number in numbers.items():
        layers[name].top_k = layers[name].router.top_k = number
    return before
