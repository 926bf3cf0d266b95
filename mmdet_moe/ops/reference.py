"""Dispatch and combine in plain PyTorch: the semantics that every faster kernel has to match."""

import torch
from torch import Tensor


def sort_routes(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the M = T·K routes by expert, keeping the order of the items inside each expert.

    Args:
        expert_ids_TK: Chosen experts, int64 of shape (T, K), values in [0, num_experts).
        num_experts: Number of experts E.

    Returns:
        ``order_M`` (int64): flat route indices ``t * K + j``, expert 0's routes first.
        ``offsets`` (int64, shape (E + 1,)): expert e owns ``order_M[offsets[e]:offsets[e + 1]]``.
        ``inverse_TK`` (int64): the position of route (t, j) in ``order_M``.

    Raises:
        ValueError: If ``expert_ids_TK`` is not a two-dimensional int64 tensor.
    """
    if expert_ids_TK.dim() != 2 or expert_ids_TK.dtype != torch.int64:
        raise ValueError(
            'expert_ids must be an int64 tensor of shape (T, K), got '
            f'{expert_ids_TK.dtype} of shape {tuple(expert_ids_TK.shape)}'
        )
    flat_M = expert_ids_TK.flatten()
    order_M = torch.argsort(flat_M, stable=True)
    offsets = flat_M.new_zeros(num_experts + 1)
    torch.cumsum(torch.bincount(flat_M, minlength=num_experts), dim=0, out=offsets[1:])
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return order_M, offsets, inverse_M.view_as(expert_ids_TK)


def dispatch(x_T: Tensor, order_M: Tensor, k: int) -> Tensor:
    """Gather the items in expert order.

    Args:
        x_T: Items, shape (T, ...), any dtype.
        order_M: From :func:`sort_routes`.
        k: Experts per item, K.

    Returns:
        Rows of shape (M, ...): row m is item ``order_M[m] // k``.
    """
    return x_T.index_select(0, torch.div(order_M, k, rounding_mode='floor'))


def combine(y_M: Tensor, weights_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """Sum each item's K rows, weighted, in the fixed order of the choice (hence deterministic).

    Half-precision rows are accumulated in float32.

    Args:
        y_M: Expert outputs in expert order, shape (M, ...).
        weights_TK: Weights, shape (T, K).
        inverse_TK: From :func:`sort_routes`.

    Returns:
        Tensor of shape (T, ...) and of ``y_M``'s dtype.
    """
    dtype = torch.promote_types(y_M.dtype, torch.float32)
    weights_TK = weights_TK.to(dtype)
    trailing = (1,) * (y_M.dim() - 1)
    total = 0
    for j in range(weights_TK.shape[1]):
        rows_T = y_M.index_select(0, inverse_TK[:, j]).to(dtype)
        total = total + rows_T * weights_TK[:, j].view(-1, *trailing)
    return total.to(y_M.dtype)
