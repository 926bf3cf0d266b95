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
    narrow: bool = False,
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
        num_shared: How many dense experts stand beside them; each gets an exact copy, or its part.
        narrow: Whether the experts are narrower than the dense module, and each takes a part of its
            channels, see :func:`~mmdet_moe.moe.experts.upcycling.slice_dense`.

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
        if not narrow and value.dim() > 1 and value.shape[1:] != expected[name].shape[1:]:
            raise ConfigError(
                f'The checkpoint\'s dense weight "{dense_prefix}{name}" of shape '
                f'{tuple(value.shape)} does not fit the experts, which need '
                f'{tuple(expected[name].shape)}: use experts of the dense width '
                "(expert_channels='dense' in MoEResNet_CIFAR), or a checkpoint of this model"
            )
    for name, value in dense.items():
        del state_dict[dense_prefix + name]
        copies = [value] * experts.num_experts
        if narrow:
            shape, number = expected[name].shape, experts.num_experts
            copies = [slice_dense(value, shape, e, number) for e in range(number)]
        for j in range(num_shared):
            key = f'{moe_prefix}shared.{j}.{experts.dense_scope}{name}'
            state_dict[key] = copies[j % len(copies)].clone()
        noisy = [_copy(part, noise, f'{prefix}{e}.{name}') for e, part in enumerate(copies)]
        experts.store(state_dict, prefix, name, noisy)


def slice_dense(dense_entry: Tensor, shape: torch.Size, expert: int, num_experts: int) -> Tensor:
    """What a narrow expert starts with when a dense checkpoint is loaded.

    Expert e takes n of a layer's N channels, from e · N // E on and around the end; the same ones
    in all layers that are tied. What sums over channels (the second dimension of a weight) is
    scaled by N / n, so that the sums keep their size; where n · E is a multiple of N, the experts'
    mean over the last hidden layer is then exactly the dense sum.

    Args:
        dense_entry: A parameter or buffer of the dense module.
        shape: Of the same one in the expert.
        expert: e.
        num_experts: E.

    Returns:
        A tensor of that shape; with equal shapes the entry itself.

    Raises:
        ConfigError: If the expert is not a narrower one of the same kind.
    """
    if len(shape) != dense_entry.dim() or any(
        n > size for n, size in zip(shape, dense_entry.shape, strict=True)
    ):
        raise ConfigError(
            f"an expert's entry of shape {tuple(shape)} cannot be cut out of a dense one of shape "
            f'{tuple(dense_entry.shape)}; load the checkpoint of the model that the experts replace'
        )
    entry = dense_entry
    for axis, (n, size) in enumerate(zip(shape, dense_entry.shape, strict=True)):
        if n != size:
            first = expert * size // num_experts
            chosen = (torch.arange(n, device=entry.device) + first) % size
            entry = entry.index_select(axis, chosen)
            if axis == 1:
                entry = entry * (size / n)
    return entry


def _copy(value: Tensor, noise: float, name: str) -> Tensor:
    clone = value.clone()
    if noise > 0 and value.is_floating_point() and value.dim() > 1:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        draw = torch.randn(value.shape, generator=generator).to(value)
        clone += noise * value.std(correction=0) * draw
    return clone
