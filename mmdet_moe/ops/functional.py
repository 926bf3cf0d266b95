"""The ops as functions with their checks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mmdet_moe.ops import library, reference


def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.onnx.export`` writes down what is computed."""
    # PyTorch 2.6 knows only the latter; and of its two exporters, the older is not among the first.
    return torch.onnx.is_in_onnx_export() or getattr(torch.compiler, 'is_exporting', bool)()


def _translator_has_one_graph() -> bool:
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().one_graph
    except (ImportError, AttributeError):
        return False


# torch.compiler.assume_constant_result() does this, too, but imports dynamo, which takes 2 s.
_translator_has_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_one_graph() -> bool:
    """Whether ``torch.compile(fullgraph=True)`` compiles what is computed.

    PyTorch has no public name for it. Where the inner one is gone the answer is no, and PyTorch
    says where its graph breaks.
    """
    return torch.compiler.is_compiling() and _translator_has_one_graph()


def uncompiled(function: Callable) -> Callable:
    """The function, for calls that ``torch.compile`` leaves as they are, with all that they do."""
    if not torch.compiler.is_compiling():
        return function
    from mmdet_moe.ops.uncompiled import call_uncompiled

    return partial(call_uncompiled, function)


def sort_routes(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Number the M = T·K routes by expert, keeping the order of the items inside each expert.

    Args:
        expert_ids_TK: Chosen experts, int64 of shape (T, K), values in [0, num_experts), or -1 for
            "no choice". Such routes come behind all others and belong to nobody.
        num_experts: Number of experts E.

    Returns:
        ``offsets`` (int64, shape (E + 1,)): expert e owns the positions ``offsets[e]`` to
        ``offsets[e + 1]``; ``R = offsets[E]`` routes are somebody's.
        ``inverse_TK`` (int64): the position of route (t, j), in [0, M), each once: expert 0's
        routes first, routes of nobody at R and behind.

    Raises:
        ValueError: If ``expert_ids_TK`` is not a two-dimensional int64 tensor.
        RuntimeError: If an id is out of range. On a GPU this is a device-side assertion, which
            shows up at the next synchronisation.
    """
    if expert_ids_TK.dim() != 2 or expert_ids_TK.dtype != torch.int64:
        raise ValueError(
            'expert_ids must be an int64 tensor of shape (T, K), got '
            f'{expert_ids_TK.dtype} of shape {tuple(expert_ids_TK.shape)}'
        )
    if num_experts < 1:
        raise ValueError(f'num_experts must be at least 1, got {num_experts}')
    return library.sort_routes(expert_ids_TK, num_experts)


def dispatch(x_T: Tensor, inverse_TK: Tensor, num_rows: int) -> Tensor:
    """Copy every item to its rows, which are in expert order.

    Args:
        x_T: Items, shape (T, ...), any dtype.
        inverse_TK: From :func:`sort_routes`. Positions of ``num_rows`` and more get no row; every
            one below must occur exactly once, or rows would be left as the memory happens to be. A
            CPU counts them; a GPU does not.
        num_rows: R = ``offsets[E]``, or T·K to give the routes of nobody rows as well.

    Returns:
        Rows of shape (R, ...): row ``inverse[t, j]`` is item t. Items that lie one after the other
        in memory without gaps keep their layout, such as ``channels_last``.

    Raises:
        ValueError: For an ``inverse`` of a wrong dtype, shape or device, and for ``num_rows``
            outside [0, T·K].
        RuntimeError: If a position is negative. On a GPU this is a device-side assertion, which
            shows up at the next synchronisation.
    """
    if x_T.dim() < 1:
        raise ValueError('x must have at least one dimension, the items')
    _check_inverse(inverse_TK, 'x', x_T)
    if inverse_TK.shape[0] != x_T.shape[0]:
        raise ValueError(
            f'inverse has routes of {inverse_TK.shape[0]} items, but x has {x_T.shape[0]}'
        )
    if not 0 <= num_rows <= inverse_TK.numel():
        raise ValueError(
            f'num_rows must be between 0 and the {inverse_TK.numel()} positions of inverse, got '
            f'{num_rows}'
        )
    if order := _memory_order(x_T):  # rows are copied as they lie in memory
        return _permuted_back(dispatch(x_T.permute(order), inverse_TK, num_rows), order)
    return library.dispatch(x_T, inverse_TK, num_rows)


def combine(y_R: Tensor, weights_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """Sum each item's rows, weighted, in the fixed order of the choice (hence deterministic).

    Rows are weighted and summed in float32, those of float64 in float64.

    Args:
        y_R: Expert outputs in expert order, shape (R, ...), floating point.
        weights_TK: Weights, shape (T, K), of any floating-point dtype.
        inverse_TK: From :func:`sort_routes`. Positions of R and more contribute 0; every one below
            must occur exactly once.

    Returns:
        Tensor of shape (T, ...) and of ``y_R``'s dtype, also under autocast; of its layout, as
        :func:`dispatch`.

    Raises:
        ValueError: For wrong dtypes, shapes or devices.
    """
    if y_R.dim() < 1 or not y_R.is_floating_point():
        raise ValueError(f'y must be a floating-point tensor of shape (R, ...), got {y_R.dtype}')
    _check_inverse(inverse_TK, 'y', y_R)
    if weights_TK.shape != inverse_TK.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f'weights must be a floating-point tensor of shape {tuple(inverse_TK.shape)}, as '
            f'inverse, got {weights_TK.dtype} of shape {tuple(weights_TK.shape)}'
        )
    _check_device('weights', weights_TK, 'y', y_R)
    if y_R.shape[0] > inverse_TK.numel():
        raise ValueError(
            f'y has {y_R.shape[0]} rows, but inverse has only {inverse_TK.numel()} positions'
        )
    if order := _memory_order(y_R):
        return _permuted_back(combine(y_R.permute(order), weights_TK, inverse_TK), order)
    wide = torch.float64 if y_R.dtype == torch.float64 else torch.float32
    return library.combine(y_R, weights_TK.to(wide), inverse_TK)


def entmax15(x: Tensor) -> Tensor:
    """1.5-entmax along the last dimension: softmax's relative that gives exact zeros.

    ``p_i = max(x_i / 2 - tau, 0)²`` with the tau for which they sum to 1, exact to rounding
    (Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019). As with softmax,
    a row is NaN if one of its values is NaN or +inf, or if all are -inf; otherwise -inf gives 0.

    It has gradients of any order, those of the values outside the support being 0. PyTorch gives
    custom ops no forward mode, and ``torch.func.jvp`` takes them for constants: for ``torch.func``
    use :func:`mmdet_moe.ops.reference.entmax15`. That is also what ``torch.export`` and
    ``torch.onnx.export`` see: an exported program needs no part of this package.

    Args:
        x: Logits, shape (..., N) with N ≥ 1, floating point. float32 and float64 are computed as
            they are, bfloat16 and float16 in float32.

    Returns:
        Tensor of ``x``'s shape and dtype (that of bfloat16 and float16 rounded), also under
        autocast. Each row is ≥ 0 and sums to 1.

    Raises:
        ValueError: For other dtypes, and without a last dimension or with an empty one.
    """
    if not x.is_floating_point():
        raise ValueError(f'x must be a floating-point tensor of shape (..., N), got {x.dtype}')
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f'x must have at least one value along its last dimension, got shape {tuple(x.shape)}'
        )
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    op = reference.entmax15 if is_exporting() else library.entmax15
    return op(wide).to(x.dtype)


def _check_inverse(inverse: Tensor, other_name: str, other: Tensor) -> None:
    if inverse.dim() != 2 or inverse.dtype != torch.int64:
        raise ValueError(
            f'inverse must be an int64 tensor of shape (T, K), got {inverse.dtype} of shape '
            f'{tuple(inverse.shape)}'
        )
    _check_device('inverse', inverse, other_name, other)


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f'{name} is on {tensor.device}, but {other_name} on {other.device}; '
            'move both to one device'
        )


def _memory_order(rows: Tensor) -> list[int]:
    """The dimensions, outermost in memory first, of rows that are dense but not contiguous."""
    if rows.is_contiguous():
        return []
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1]  # in 1 µs, where dim_order() takes 90
    order = [0, *(d for d in rows.dim_order() if d)]
    return order if rows.permute(order).is_contiguous() else []


def _permuted_back(rows: Tensor, order: list[int]) -> Tensor:
    return rows.permute([order.index(d) for d in range(len(order))])
