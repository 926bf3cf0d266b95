"""Loading a dense checkpoint into experts."""

import zlib

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts.base import Experts


def upcycle(
    state_dict: dict[str, Tensor],
    dense_prefix: str,
    moe_prefix: str,
    experts: Experts,
    noise: float,
    num_shared: int = 0,
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
        num_shared: How many dense experts stand beside them; each gets an exact copy.

    Raises:
        ConfigError: If the checkpoint holds another number of experts, or dense weights with
            other inputs than the experts have.
    """
    prefix = moe_prefix + 'experts.'
    dense_prefix += experts.dense_scope
    expected = experts.entries()
    converted = dict(state_dict)  # the caller's stays as it is if it does not fit
    found = experts.count(converted, prefix)
    if found not in (0, experts.num_experts):
        raise ConfigError(
            f'The checkpoint has {found} experts in "{moe_prefix.rstrip(".")}" but the model has '
            f'{experts.num_experts}; set num_experts={found} in the config, or load a dense '
            'checkpoint'
        )
    state_dict.clear()
    state_dict.update(converted)
    dense = {
        name: state_dict[dense_prefix + name]
        for name in expected
        if dense_prefix + name in state_dict
    }
    if found or not dense:
        return
    for name, value in dense.items():
        # Other outputs are a prediction layer for other classes, other inputs another network.
        if value.dim() > 1 and value.shape[1:] != expected[name].shape[1:]:
            raise ConfigError(
                f'The checkpoint\'s dense weight "{dense_prefix}{name}" of shape '
                f'{tuple(value.shape)} does not fit the experts, which need '
                f'{tuple(expected[name].shape)}: use experts of the dense width '
                "(expert_channels='dense' in MoEResNet_CIFAR), or a checkpoint of this model"
            )
    for name, value in dense.items():
        del state_dict[dense_prefix + name]
        copies = [_copy(value, noise, f'{prefix}{e}.{name}') for e in range(experts.num_experts)]
        experts.store(state_dict, prefix, name, copies)
        for j in range(num_shared):
            key = f'{moe_prefix}shared.{j}.{experts.dense_scope}{name}'
            state_dict[key] = value.clone()


@torch.no_grad()
def perturb(experts: Experts, noise: float, name: str) -> None:
    """Give experts that are copies of one another the noise of an upcycled checkpoint.

    Args:
        experts: Changed in place.
        noise: As of :func:`upcycle`.
        name: Of their layer, on which the noise depends.
    """
    state: dict[str, Tensor] = {}
    for entry, value in experts.entries().items():
        keys = [f'{name}.experts.{e}.{entry}' for e in range(experts.num_experts)]
        experts.store(state, '', entry, [_copy(value, noise, key) for key in keys])
    experts.load_state_dict(state)


def _copy(value: Tensor, noise: float, name: str) -> Tensor:
    clone = value.clone()
    if noise > 0 and value.is_floating_point() and value.dim() > 1:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        draw = torch.randn(value.shape, generator=generator).to(value)
        clone += noise * value.std(correction=0) * draw
    return clone
