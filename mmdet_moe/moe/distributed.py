"""Sums over all ranks: balancing is global, so R ranks × N images behave as 1 rank × R·N images."""

import torch
import torch.distributed as dist
from torch import Tensor


def _active() -> bool:
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
    if not _active():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    if not x.requires_grad:
        return total
    return total + dist.get_world_size() * (x - x.detach())


def global_sum_(tensors: list[Tensor]) -> None:
    """Sum statistics (no gradient) over the ranks in place, in one collective."""
    if not _active() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def is_first_rank() -> bool:
    """Whether this is the rank that :func:`from_first_rank_` asks."""
    return not _active() or dist.get_rank() == 0


def from_first_rank_(tensors: list[Tensor]) -> None:
    """Give every rank what the first one has, in place."""
    if _active():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
