"""The ops in plain PyTorch: what every kernel has to match, and what serves where none is built.

Arguments, shapes and errors are described in :mod:`mmdet_moe.ops.functional`. ``sort_routes``,
``dispatch``, ``combine`` and ``entmax15`` are differentiable by themselves, as often as wanted; the
``*_backward`` functions spell out the first derivative for the registered ops.
"""

import torch
from torch import Tensor


def sort_routes(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable sort of the routes by expert, those with id -1 last: offsets and positions."""
    flat = expert_ids.flatten()
    if flat.numel() and not flat.is_meta:
        low, high = flat.aminmax()
        if low < -1 or high >= num_experts:
            wrong = int(low) if low < -1 else int(high)
            raise RuntimeError(
                f'expert_ids holds {wrong}, but there are {num_experts} experts: ids must lie in '
                f'[0, {num_experts}), or be -1 for no choice'
            )
    bucket = flat.where(flat >= 0, num_experts)
    order = torch.argsort(bucket, stable=True)
    counts = torch.bincount(bucket, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return offsets, inverse.view_as(expert_ids)


def dispatch(x: Tensor, inverse: Tensor, num_rows: int) -> Tensor:
    """Row ``inverse[t, j]`` is item t; positions behind the rows are left out."""
    items = torch.arange(inverse.shape[0], device=x.device)[:, None].expand_as(inverse)
    # A row that nobody writes is of an item that there is not, which index_select refuses.
    item_of_row = items.new_full((num_rows + 1,), inverse.shape[0])
    item_of_row.scatter_(0, inverse.clamp(max=num_rows).flatten(), items.flatten())
    return x.index_select(0, item_of_row[:num_rows])


def dispatch_backward(grad: Tensor, inverse: Tensor) -> Tensor:
    """Sum over each item's rows, routes without a row left out."""
    return combine(grad, torch.ones(inverse.shape, device=grad.device), inverse)


def combine(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """Weighted sum over each item's rows; positions behind the rows contribute 0."""
    weights = weights.to(_wide(y))
    trailing = (1,) * (y.dim() - 1)
    total = weights.new_zeros(inverse.shape[0], *y.shape[1:])
    for j in range(inverse.shape[1]):
        rows, kept = _rows(y, inverse[:, j])
        weight = weights[:, j].where(kept, 0)
        total = total + rows.to(weight.dtype) * weight.view(-1, *trailing)
    return total.to(y.dtype)


def combine_backward(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`combine` with respect to ``y`` and ``weights``."""
    wide = grad.to(weights.dtype)
    trailing = (1,) * (y.dim() - 1)
    grad_y = y.new_zeros(y.shape)  # contiguous, as every kernel's
    grad_weights = weights.new_zeros(weights.shape)
    for j in range(inverse.shape[1]):
        rows, kept = _rows(y, inverse[:, j])
        dots = (wide * rows.to(wide.dtype)).unsqueeze(-1).flatten(1).sum(1)
        grad_weights[:, j] = dots.where(kept, 0)
        scaled = (wide * weights[:, j].view(-1, *trailing)).to(y.dtype)
        grad_y[inverse[kept, j]] = scaled[kept]
    return grad_y, grad_weights


def entmax15(x: Tensor) -> Tensor:
    """1.5-entmax along the last dimension: the support by a sort, then a quadratic equation.

    Standard operations alone, which every exporter knows.
    """
    # The largest becomes 0. What is below -1 is never in the support, and may be -inf.
    z = ((x - x.detach().amax(-1, keepdim=True)) / 2).clamp(min=-2).contiguous()
    near = _threshold(z.detach())
    # What is missing to the equation's smaller root: exact, and with the root's derivatives.
    distances = (z - near).relu()
    count = (distances > 0).sum(-1, keepdim=True)
    total = distances.sum(-1, keepdim=True)
    excess = distances.square().sum(-1, keepdim=True) - 1
    rest = excess / (total + (total.square() - count * excess).sqrt())
    return (z - near - rest).relu().square()


def _threshold(z: Tensor) -> Tensor:
    """The threshold up to rounding errors of large sums."""
    descending = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = descending.cumsum(-1) / count
    variance = descending.square().cumsum(-1) / count - mean.square()
    tau = mean - (1 / count - variance).clamp(min=0).sqrt()
    size = (tau <= descending).sum(-1, keepdim=True)
    return tau.gather(-1, (size - 1).clamp(min=0))  # no size at all if there are NaNs


def entmax15_backward(grad: Tensor, p: Tensor) -> Tensor:
    """Gradient of :func:`entmax15` with respect to ``x``; ``p`` is what it returned."""
    root = p.sqrt()
    mean = (root * grad).sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
    return (root * (grad - mean)).contiguous()


def _rows(y: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at the positions (zeros where there is none), and which positions have one."""
    kept = positions < y.shape[0]
    if y.shape[0] == 0:
        return y.new_zeros(len(positions), *y.shape[1:]), kept
    rows = y.index_select(0, positions.clamp(max=y.shape[0] - 1))
    trailing = (1,) * (y.dim() - 1)
    return rows.masked_fill(~kept.view(-1, *trailing), 0), kept


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32
