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
        module: Left as it was.
        x: Its input.
    """
    training = module.training
    module.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            module(x)
    finally:
        module.train(training)
    return counter.get_total_flops()
