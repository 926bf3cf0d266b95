"""What autocast does, where it does not know our operations, and what stays in float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That to which autocast casts what goes into a matrix product."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """As autocast casts what goes into a matrix product; it does not know all of ours."""
    return x.to(autocast_dtype(x))


class CastBefore(torch.autograd.Function):
    """A parameter as it was cast before. Its gradient is added up in its own dtype, use by use."""

    @staticmethod
    def forward(ctx, parameter: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return cast.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off. Entered only where it is on: that takes as long as an operation."""
    # There is none on the device meta.
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class KeepsPrecision(nn.Module):
    """Base class of modules whose own buffers ``half()`` and ``bfloat16()`` leave as they are.

    In half precision a sum over a training stands still once a step is less than its rounding.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'KeepsPrecision':
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, after in dict(self.named_buffers(recurse=False)).items():
            if after.dtype.itemsize < before[name].dtype.itemsize:
                self._buffers[name] = before[name].to(after.device)
        return self
