"""Floating-point operations of a module, counted by PyTorch while it runs."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(module: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass in eval mode, a multiplication and an addition counted as two.

    Sparse experts count as far as they are evaluated: one image gives the *active* FLOPs of a model
    that routes images. On the ``meta`` device nothing is computed; a router needs real values.

    Args:
        module: Left as it was, but for what it remembers of its latest forward pass.
        x: Its input.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            module(x)
    finally:
        for part, training in modes.items():
            part.training = training
    return counter.get_total_flops()
