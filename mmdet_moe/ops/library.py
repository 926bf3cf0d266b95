"""The ops ``torch.ops.mmdet_moe.*``: schemas, shapes, gradients, and which kernels serve them.

The PyTorch reference serves every device. Where a binary has been built for a device
(:mod:`mmdet_moe.ops.native`), its kernels are registered for that device and take precedence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdet_moe.ops import native, reference

_SCHEMAS = (
    'sort_routes(Tensor expert_ids, int num_experts) -> (Tensor offsets, Tensor inverse)',
    'dispatch(Tensor x, Tensor inverse, SymInt num_rows) -> Tensor',
    'dispatch_backward(Tensor grad, Tensor inverse) -> Tensor',
    'combine(Tensor y, Tensor weights, Tensor inverse) -> Tensor',
    'combine_backward(Tensor grad, Tensor y, Tensor weights, Tensor inverse) -> (Tensor grad_y, '
    'Tensor grad_weights)',
    'entmax15(Tensor x) -> Tensor',
    'entmax15_backward(Tensor grad, Tensor p) -> Tensor',
)

# Kept for as long as the process lives: dropping it would unregister everything.
_LIBRARY = torch.library.Library('mmdet_moe', 'DEF')
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)


def prefer_reference(key: str) -> None:
    """Let the reference serve a kind of device, in place of the kernels that are loaded.

    Args:
        key: PyTorch's name of it, such as ``'CUDA'``.
    """
    for name in (schema.partition('(')[0] for schema in _SCHEMAS):
        _LIBRARY.impl(name, getattr(reference, name), key)


def _sort_routes_shapes(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return expert_ids.new_empty(num_experts + 1), expert_ids.new_empty(expert_ids.shape)


def _dispatch_shape(x: Tensor, inverse: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, *x.shape[1:])


def _items_shape(rows: Tensor, *others: Tensor) -> Tensor:
    inverse = others[-1]
    return rows.new_empty(inverse.shape[0], *rows.shape[1:])


def _combine_backward_shapes(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _entmax15_shape(*tensors: Tensor) -> Tensor:
    return tensors[-1].new_empty(tensors[-1].shape)


def _save_for_dispatch(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _dispatch_gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return dispatch_backward(grad, *ctx.saved_tensors), None, None


def _save_for_dispatch_backward(ctx, inputs, output) -> None:
    rows, inverse = inputs
    ctx.save_for_backward(inverse)
    ctx.num_rows = rows.shape[0]


def _dispatch_backward_gradient(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return dispatch(grad, *ctx.saved_tensors, ctx.num_rows), None


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *combine_backward(grad, *ctx.saved_tensors), None


def _no_second_derivative(ctx, *grads) -> None:
    raise RuntimeError(
        'mmdet_moe.combine has no second derivative; compute it with combine of '
        'mmdet_moe.ops.reference'
    )


def _save_for_entmax15(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _entmax15_gradient(ctx, grad: Tensor) -> Tensor:
    (p,) = ctx.saved_tensors
    return entmax15_backward(grad, p)


def _entmax15_backward_gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sqrt(p) and a bar for the mean weighted with s, entmax15_backward is s·(g - ḡ).

    Its product with v is symmetric in g and v, and its derivative by s_k is (g_k - ḡ)·(v_k - v̄).
    """
    first, p = ctx.saved_tensors
    support = p > 0
    root = p.where(support, 1).sqrt()  # where it is 0, it would have an infinite derivative
    weights = root.where(support, 0) / root.where(support, 0).sum(-1, keepdim=True)
    centred = [g - (weights * g).sum(-1, keepdim=True) for g in (first, grad)]
    grad_p = (centred[0] * centred[1] / (2 * root)).where(support, 0)
    return entmax15_backward(grad, p), grad_p


def _op(
    name: str,
    shapes: Callable,
    gradient: Callable | None = None,
    save: Callable[[Any, tuple, Any], None] | None = None,
) -> Callable:
    """Register an op, and make the function that calls it.

    Outside of graphs and transforms, which need what is registered, the function passes by the
    Python layers of ``register_autograd``, which take longer than the op on small tensors.

    Args:
        name: As in its schema and in the reference.
        shapes: Empty outputs for the inputs.
        gradient: Of the inputs, as ``register_autograd`` wants it; None if it has none.
        save: What ``gradient`` needs.
    """
    _LIBRARY.impl(name, getattr(reference, name), 'CompositeExplicitAutograd')
    torch.library.register_fake(f'mmdet_moe::{name}', shapes, lib=_LIBRARY)
    op = getattr(torch.ops.mmdet_moe, name).default
    if gradient is None:
        return op
    torch.library.register_autograd(
        f'mmdet_moe::{name}', gradient, setup_context=save, lib=_LIBRARY
    )

    formula: Callable[..., Any] = gradient

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            if save is not None:
                save(ctx, inputs, output)
            return output

        backward = staticmethod(formula)

    def call(*inputs):
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
        ):
            return op(*inputs)
        if torch.is_grad_enabled() and any(getattr(i, 'requires_grad', False) for i in inputs):
            return Eager.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


sort_routes = _op('sort_routes', _sort_routes_shapes)
dispatch = _op('dispatch', _dispatch_shape, _dispatch_gradient, _save_for_dispatch)
dispatch_backward = _op(
    'dispatch_backward',
    _items_shape,
    _dispatch_backward_gradient,
    _save_for_dispatch_backward,
)
combine = _op('combine', _items_shape, _combine_gradient, _save_inputs)
combine_backward = _op('combine_backward', _combine_backward_shapes, _no_second_derivative)
entmax15 = _op('entmax15', _entmax15_shape, _entmax15_gradient, _save_for_entmax15)
entmax15_backward = _op(
    'entmax15_backward', _entmax15_shape, _entmax15_backward_gradient, _save_inputs
)
native.load()
