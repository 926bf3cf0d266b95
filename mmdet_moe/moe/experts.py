"""Making experts of a dense module, and loading a dense checkpoint into them."""

import copy
import re
import zlib

import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError


def independent_copies(module: nn.Module, num: int) -> list[nn.Module]:
    """The module itself and ``num - 1`` copies whose weights are drawn anew.

    Layers with a ``reset_parameters`` method (all of PyTorch's own) get fresh values, so experts
    differ from the start; further initialisation is the business of MMEngine's ``init_weights``.
    """
    copies = [module] + [copy.deepcopy(module) for _ in range(num - 1)]
    for clone in copies[1:]:
        for layer in clone.modules():
            if callable(getattr(layer, 'reset_parameters', None)):
                layer.reset_parameters()
    return copies


def upcycle(
    state_dict: dict[str, Tensor],
    dense_prefix: str,
    moe_prefix: str,
    experts: nn.ModuleList,
    noise: float,
) -> None:
    """Turn the entries of a dense module into entries of its experts, in place.

    Every expert gets a copy; the dense entries are removed. A checkpoint that has experts already,
    or nothing of the dense module, is left alone. Entries of another shape (a prediction layer for
    other classes) are copied, too: the loader reports them as it does for a dense model.

    Args:
        state_dict: The checkpoint, changed in place.
        dense_prefix: Prefix of the dense module's names, with its dot.
        moe_prefix: Prefix of the MoE layer's names, with its dot.
        experts: The experts that the entries must fit.
        noise: Standard deviation of the noise added to each expert's weights (not to biases or
            normalisation), relative to the standard deviation of the weight itself. With 0 the
            experts are exact copies. It depends on the name of the weight alone, so that all ranks
            draw the same.

    Raises:
        ConfigError: If the checkpoint holds another number of experts, or if no dense weight has
            the shape of the experts'.
    """
    _check_number_of_experts(state_dict, moe_prefix, len(experts))
    if any(key.startswith(moe_prefix + 'experts.') for key in state_dict):
        return
    expected = experts[0].state_dict()
    dense = {
        name: state_dict[dense_prefix + name]
        for name in expected
        if dense_prefix + name in state_dict
    }
    if not dense:
        return
    weights = [name for name, value in dense.items() if value.dim() > 1]
    if weights and all(dense[name].shape != expected[name].shape for name in weights):
        name = weights[0]
        raise ConfigError(
            f'The checkpoint\'s dense weight "{dense_prefix}{name}" of shape '
            f'{tuple(dense[name].shape)} does not fit the experts, which need '
            f'{tuple(expected[name].shape)}, and no other one does: use experts of the dense '
            'width, or a checkpoint of this model'
        )
    for name, value in dense.items():
        del state_dict[dense_prefix + name]
        for e in range(len(experts)):
            key = f'{moe_prefix}experts.{e}.{name}'
            clone = value.clone()
            if noise > 0 and value.is_floating_point() and value.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                draw = torch.randn(value.shape, generator=generator).to(value)
                clone += noise * value.std(correction=0) * draw
            state_dict[key] = clone


def _check_number_of_experts(state_dict: dict[str, Tensor], prefix: str, num_experts: int) -> None:
    pattern = re.compile(re.escape(prefix) + r'experts\.(\d+)\.')
    found = {int(m.group(1)) for m in map(pattern.match, state_dict) if m}
    if found and len(found) != num_experts:
        raise ConfigError(
            f'The checkpoint has {len(found)} experts in "{prefix.rstrip(".")}" but the model has '
            f'{num_experts}; set num_experts={len(found)} in the config, or load a dense checkpoint'
        )
