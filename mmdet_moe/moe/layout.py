"""The memory format of feature maps."""

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` for maps (N, C, H, W) that lie so and not contiguously as well."""
    if (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format
