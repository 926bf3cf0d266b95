"""Mixed precision on a CPU, where MMEngine's ``AmpOptimWrapper`` refuses to be built."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


def has_bfloat16() -> bool:
    """Whether PyTorch's convolutions use bfloat16 instructions of this processor.

    Others compute it value by value: with AVX2 alone a training step of a ResNet-18 takes 6 to 9
    times as long as in float32 (docs/dispatch.md).
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """An :class:`~mmengine.optim.OptimWrapper` whose forward runs in bfloat16 where that is safe.

    bfloat16 has the range of float32, so that no loss scale is needed. On a processor without it
    (:func:`has_bfloat16`) the forward runs in float32.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        autocast = torch.autocast('cpu', dtype=torch.bfloat16, enabled=has_bfloat16())
        with super().optim_context(model), autocast:
            yield
