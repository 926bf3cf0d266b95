"""Sums over all ranks: balancing is global, so R ranks × N images behave as 1 rank × R·N images."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_sum(x: Tensor) -> Tensor:
    """Sum ``x`` over the ranks, with the gradient that data-parallel averaging needs.

    Distributed data parallel divides the summed gradients by the number R of ranks, but a loss of
    a global sum is one loss, not the mean of R losses. The gradient of this rank's part is
    therefore multiplied by R here, and no collective is needed in the backward pass.

    Args:
        x: This rank's part, any shape; the same shape on every rank.

    Returns:
        The sum, of the same shape. Without ``torch.distributed`` it is ``x`` itself.
    """
    if not is_distributed():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    if not x.requires_grad:
        return total
    return total + dist.get_world_size() * (x - x.detach())


def global_sum_(tensors: list[Tensor]) -> None:
    """Sum statistics (no gradient) over the ranks in place, in one collective."""
    if not is_distributed() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def is_first_rank() -> bool:
    """Whether this is the rank that :func:`from_first_rank_` asks."""
    return not is_distributed() or dist.get_rank() == 0


def from_first_rank_(tensors: list[Tensor]) -> None:
    """Give every rank what the first one has, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def own_random(draw: Callable[..., Tensor], like: Tensor) -> Tensor:
    """Random numbers of this rank's own, even if the generators of all ranks are in the same state.

    Args:
        draw: ``torch.rand`` or ``torch.randn``.
        like: Whose shape, dtype and device they get.

    Returns:
        On the first rank the next ones of the default generator; on others those of a generator
        that is seeded by it and the rank.
    """
    settings = {'dtype': like.dtype, 'device': like.device}
    # torch.compile does not know generators.
    if is_first_rank() or torch.compiler.is_compiling():
        return draw(like.shape, **settings)
    # The host's generator, which an activation checkpoint restores like all others.
    seed = int(torch.randint(2**31, (), device='cpu')) + (dist.get_rank() << 31)
    generator = torch.Generator(like.device).manual_seed(seed)
    return draw(like.shape, generator=generator, **settings)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` cut a part of a module, so that ranks wait for each other in it."""
    fsdp = sys.modules.get('torch.distributed.fsdp')
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in module.modules())
