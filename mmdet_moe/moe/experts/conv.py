"""Convolutions as experts: E kernels in one tensor, and three exact ways to apply them.

An item's output is ``sum_j w_j (W_j * x + b_j)``, and convolution is linear in the kernel, so it
is also ``(sum_j w_j W_j) * x + sum_j w_j b_j``: instead of k convolutions of the item, one with its
own mixture of k kernels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher, EveryExpert
from mmdet_moe.moe.experts.base import StackedExperts
from mmdet_moe.moe.experts.conv_cost import MOST_MIXED_BYTES, cheapest
from mmdet_moe.moe.experts.linear import grouped_linear
from mmdet_moe.moe.layout import memory_format_of
from mmdet_moe.moe.precision import autocast, autocast_dtype, no_autocast
from mmdet_moe.registry import MODELS

IMPLS = ('auto', 'subbatches', 'grouped', 'views')
#: Convolutions whose kernels are all there is to them. mmcv's wrapper (``conv_cfg`` of type 'Conv')
#: computes what PyTorch's does; by name, because the core gets by without mmcv.
_PLAIN = ('torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d')


@MODELS.register_module()
class ConvExperts(StackedExperts):
    """E two-dimensional convolutions of the same kind, with zero padding.

    ``in_channels``, ``out_channels``, ``kernel_size``, ``stride``, ``padding``, ``dilation``,
    ``groups`` and ``bias`` are those of ``torch.nn.Conv2d``, for each expert.

    Args:
        num_experts: E.
        impl: How they are evaluated; all ways give the same result up to rounding.
            ``'subbatches'``: the items are sorted by expert, and each expert convolves its own
            (1×1 kernels on pixels: one grouped matrix product).
            ``'views'``: item by item, without sorted copies; each is convolved once, with the
            mixture of its experts' kernels. ``'grouped'``: the mixtures of all items, in one
            grouped convolution. ``'auto'``: the one that
            :func:`~mmdet_moe.moe.experts.conv_cost.cheapest` expects to be the fastest.
        init_cfg: MMEngine's initialisation of one expert, seen as an ``nn.Conv2d``. Default: that
            of ``nn.Conv2d`` itself.

    Raises:
        ConfigError: If ``impl`` is unknown.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        num_experts: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        impl: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if impl not in IMPLS:
            raise ConfigError(f'impl={impl!r} is unknown; use one of {IMPLS}')
        if num_experts < 1:
            raise ConfigError(f'num_experts={num_experts}: there must be at least 1 expert')
        self.impl = impl
        self._options: dict[str, Any] = {
            'in_channels': in_channels,
            'out_channels': out_channels,
            'kernel_size': kernel_size,
            'stride': stride,
            'padding': padding,
            'dilation': dilation,
            'groups': groups,
            'bias': bias,
        }
        convs = [self.dense() for _ in range(num_experts)]
        first = convs[0]
        self.stride, self.dilation, self.groups = first.stride, first.dilation, first.groups
        self.padding = _symmetric_padding(first)
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.register_parameter('bias', nn.Parameter(torch.stack(biases)) if bias else None)

    @classmethod
    def like(cls, conv: nn.Conv2d, num_experts: int, **kwargs: Any) -> 'ConvExperts':
        """Experts of the kind of a given convolution; further arguments as of the class.

        Raises:
            ConfigError: If the convolution computes more than a plain one does, or pads with
                anything but zeros.
        """
        kind = type(conv)
        if not _is_plain(conv):
            raise ConfigError(
                f'conv_cfg: {kind.__name__} is not supported by ConvExperts, which would drop what '
                "makes it differ from nn.Conv2d; use conv_cfg=dict(type='Conv2d')"
            )
        if conv.padding_mode != 'zeros':
            raise ConfigError(
                f'padding_mode={conv.padding_mode!r} is not supported by ConvExperts; use zeros'
            )
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            num_experts,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            **kwargs,
        )

    def dense(self) -> nn.Conv2d:
        return nn.Conv2d(**self._options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'ConvExperts':
        # `model.to(memory_format=torch.channels_last)` knows tensors of four dimensions. Stacked
        # kernels stay as they are.
        def on_kernels(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2]).contiguous()

        return super()._apply(on_kernels, recurse)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """(H', W') of the output for (H, W) of the input."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                size, self.padding, self.dilation, self.weight.shape[3:], self.stride, strict=True
            )
        )

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        reach = [(k - 1) * d for k, d in zip(self.weight.shape[3:], self.dilation, strict=True)]
        radius = max(max(p, r - p) for p, r in zip(self.padding, reach, strict=True))
        return radius, max(self.stride)

    def forward(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        if isinstance(dispatcher, EveryExpert):
            return self._dense(x_T, dispatcher)
        impl = self.impl
        if impl == 'auto':
            impl = cheapest(self, x_T, dispatcher)
        return getattr(self, f'_{impl}')(x_T, dispatcher)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def _subbatches(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        if self._is_linear_on(x_T):
            rows_R = dispatcher.dispatch(x_T).flatten(1)
            stacked = dispatcher.cast(self.weight).flatten(2)
            y_R = grouped_linear(rows_R, stacked, self.bias, dispatcher)
            return dispatcher.combine(y_R)[:, :, None, None]
        weights = dispatcher.parts(self.weight)
        biases = (None,) * len(weights) if self.bias is None else dispatcher.parts(self.bias)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._convolve(x, dispatcher.cast(weight), bias, self.groups)

        experts = [
            partial(convolve, weight=weight, bias=bias)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return dispatcher.through(x_T, experts)

    def _dense(self, x_T: Tensor, dispatcher: EveryExpert) -> Tensor:
        """With no shape that depends on a decision: one convolution for each item, with its mixture
        of kernels, where it is known how many there are; else one with the kernels of all experts.
        """
        num_items, num_kernels = x_T.shape[0], dispatcher.expert_ids.numel()
        of_items = dispatcher.factors.dim() == 2  # and not of the pixels of a map
        if self.groups > 1 or (of_items and self._is_linear_on(x_T)):
            return self._subbatches(x_T, dispatcher)
        mixes = (
            isinstance(num_items, int)  # no size that an export leaves free
            and not torch.jit.is_tracing()
            and of_items
            and 0 < num_kernels * self.weight[0].numel() * self.weight.itemsize < MOST_MIXED_BYTES
        )
        if not mixes:
            bias = None if self.bias is None else self.bias.flatten()
            y = self._convolve(x_T, self.weight.flatten(0, 1), bias, 1)
            return dispatcher.sum(y.unflatten(1, self.weight.shape[:2]).unbind(1))
        with no_autocast(x_T.device.type):
            kernels = _chosen_mixture(self.weight, dispatcher).flatten(0, 1)
            bias = None if self.bias is None else _chosen_mixture(self.bias, dispatcher).flatten()
        y = self._convolve(x_T.flatten(0, 1)[None], kernels, bias, num_items)
        return y[0].unflatten(0, (num_items, -1)).contiguous(memory_format=memory_format_of(x_T))

    def _is_linear_on(self, x_T: Tensor) -> bool:
        """Whether the items are pixels and the convolutions matrix products."""
        return (
            tuple(x_T.shape[2:]) == (1, 1)
            and tuple(self.weight.shape[3:]) == (1, 1)
            and tuple(self.padding) == (0, 0)
            and self.groups == 1
        )

    def _grouped(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        num_items = x_T.shape[0]
        if num_items == 0:
            return self._subbatches(x_T, dispatcher)
        with no_autocast(x_T.device.type):
            kernels = self._mixed(self.weight, dispatcher).flatten(0, 1)
            biases = None if self.bias is None else self._mixed(self.bias, dispatcher).flatten()
        # All items side by side as the channels of one image.
        wide = x_T.reshape(1, -1, *x_T.shape[2:])
        y = self._convolve(wide, kernels, biases, self.groups * num_items)
        y = y.view(num_items, -1, *y.shape[2:])
        return y.contiguous(memory_format=memory_format_of(x_T))

    def _views(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        if x_T.shape[0] == 0:
            return self._subbatches(x_T, dispatcher)
        x_T, dtype = autocast(x_T), autocast_dtype(self.weight)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        with no_autocast(x_T.device.type):
            biases = None if self.bias is None else self._mixed(self.bias, dispatcher).to(dtype)
            weights = dispatcher.weights.to(self.weight.dtype)
            return _ConvolveViews.apply(
                x_T, self.weight, weights, biases, dispatcher.expert_ids.tolist(), dtype, geometry
            )

    def _mixed(self, stacked: Tensor, dispatcher: Dispatcher) -> Tensor:
        """The mixture of kernels, or of biases, of each item: (E, ...) to (T, ...)."""
        weights = dispatcher.weights.to(stacked.dtype)
        mixed = _MixKernels.apply(stacked.flatten(1), weights, dispatcher.expert_ids)
        return mixed.unflatten(1, stacked.shape[1:])

    def extra_repr(self) -> str:
        options = ', '.join(f'{k}={v}' for k, v in self._options.items())
        return f'num_experts={self.num_experts}, {options}, impl={self.impl!r}'


def _is_plain(module: object) -> TypeGuard[nn.Conv2d]:
    return f'{type(module).__module__}.{type(module).__qualname__}' in _PLAIN


def is_plain_conv(module: object) -> TypeGuard[nn.Conv2d]:
    """Whether :meth:`ConvExperts.like` can take a module's place."""
    return _is_plain(module) and module.padding_mode == 'zeros'


def _chosen_mixture(stacked: Tensor, dispatcher: EveryExpert) -> Tensor:
    """As :class:`_MixKernels`, in operations that every runtime knows: (E, ...) to (T, ...)."""
    ids, weights = dispatcher.expert_ids, dispatcher.weights.to(stacked.dtype)
    chosen = stacked.flatten(1).index_select(0, ids.flatten()).unflatten(0, ids.shape)
    weights = weights[..., None]
    mixed = torch.where(weights == 0, 0, weights * chosen).sum(1)
    return mixed.unflatten(1, stacked.shape[1:])


class _MixKernels(torch.autograd.Function):
    """``sum_j weights[t, j] · kernels[ids[t, j]]``: (E, P), (T, K) and (T, K) to (T, P).

    As the product with a (T, E) matrix, but the forward pass touches K kernels per item instead of
    all E.
    """

    @staticmethod
    def forward(ctx, kernels: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(kernels, weights, ids)
        # The kernels take the place of the rows that `combine` gathers.
        chosen = ids.masked_fill(weights == 0, len(kernels))
        wide = torch.promote_types(kernels.dtype, torch.float32)
        return torch.ops.mmdet_moe.combine(kernels, weights.to(wide), chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kernels, weights, ids = ctx.saved_tensors
        need_kernels, need_weights, _ = ctx.needs_input_grad
        grad_kernels = grad_weights = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_kernels:
                mixture = weights.new_zeros(len(ids), len(kernels)).scatter_add(1, ids, weights)
                grad_kernels = mixture.T @ grad
            if need_weights:
                grad_weights = (grad @ kernels.T).gather(1, ids).masked_fill(weights == 0, 0)
        return grad_kernels, grad_weights, None


class _ConvolveViews(torch.autograd.Function):
    """Item t convolved with ``sum_j weights[t, j] · weight[ids[t][j]]``, one item after the other.

    Written out because autograd would keep T mixed kernels for the backward pass; to mix again is
    cheaper than to read them back from memory.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        weights: Tensor,
        biases: Tensor | None,
        ids: list[list[int]],
        dtype: torch.dtype,
        geometry: tuple,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, weights)
        ctx.ids, ctx.dtype, ctx.geometry = ids, dtype, geometry
        ctx.has_bias = biases is not None
        shares = weights.tolist()
        kernel = torch.empty_like(weight[0])
        y: Tensor | None = None
        for t, experts in enumerate(ids):
            mixed = _mix(kernel, weight, experts, shares[t]).to(dtype)
            bias = None if biases is None else biases[t]
            out = F.conv2d(x[t : t + 1], mixed, bias, *geometry)
            if y is None:
                y = torch.empty(
                    (len(ids), *out.shape[1:]),
                    dtype=out.dtype,
                    device=out.device,
                    memory_format=memory_format_of(x),
                )
            y[t] = out[0]
        assert y is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, weights = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        need_x, need_weight, need_weights, need_biases = ctx.needs_input_grad[:4]
        shares = weights.tolist()
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_weights = torch.zeros_like(weights) if need_weights else None
        grad_biases = grad.new_empty(grad.shape[:2]) if need_biases else None
        kernel = torch.empty_like(weight[0])
        for t, experts in enumerate(ctx.ids):
            mixed = _mix(kernel, weight, experts, shares[t]).to(ctx.dtype)
            of_x, of_kernel, of_bias = torch.ops.aten.convolution_backward(
                grad[t : t + 1],
                x[t : t + 1],
                mixed,
                [weight.shape[1]] if ctx.has_bias else None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                [need_x, need_weight or need_weights, need_biases],
            )
            if grad_x is not None:
                grad_x[t] = of_x[0]
            if grad_biases is not None:
                grad_biases[t] = of_bias
            if of_kernel is None:
                continue
            of_kernel = of_kernel.to(weight.dtype)
            for j, (e, share) in enumerate(zip(experts, shares[t], strict=True)):
                if share == 0:
                    continue
                if grad_weight is not None:
                    grad_weight[e].add_(of_kernel, alpha=share)
                if grad_weights is not None:
                    grad_weights[t, j] = torch.dot(of_kernel.flatten(), weight[e].flatten())
        return grad_x, grad_weight, grad_weights, grad_biases, None, None, None


def _mix(kernel: Tensor, weight: Tensor, experts: list[int], shares: list[float]) -> Tensor:
    """``sum_j shares[j] · weight[experts[j]]``, in the memory of ``kernel``."""
    if shares[0] == 0:
        kernel.zero_()
    else:
        torch.mul(weight[experts[0]], shares[0], out=kernel)
    for e, share in zip(experts[1:], shares[1:], strict=True):
        if share != 0:
            kernel.add_(weight[e], alpha=share)
    return kernel


def _symmetric_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """Padding in numbers, also of ``'same'`` and ``'valid'``."""
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == 'valid':
        return (0, 0)
    total = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if any(t % 2 for t in total):
        raise ConfigError(
            f"padding='same' needs odd kernel sizes, got kernel_size={conv.kernel_size}; "
            'give the padding in numbers'
        )
    return (total[0] // 2, total[1] // 2)
