"""What autocast does, where it does not know our operations."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """As autocast casts what goes into a matrix product; it does not know all of ours."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off. Entered only where it is on: that takes as long as an operation."""
    # There is none on the device meta.
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
