"""Which way to evaluate convolution experts is the fastest: a cost model, measured on a CPU.

Each way's time is a sum of a few terms with one coefficient each, in milliseconds per unit. The
coefficients come from a non-negative least-squares fit of relative errors to 129 layers on 2 cores
(3×3 and 1×1 kernels, 32 to 256 channels, 4×4 to 64×64 pixels, 2 to 64 items, k = 1 to 4, E = 4 to
32, float32), but for those of mixing and its gradient, which were set by hand after that code had
changed. Those of bfloat16 are fitted to 60 such layers (E = 8) on one core with AMX, those of
``channels_last``, for which a grouped convolution copies its maps twice, to the CPU time of 120 (E
= 4 to 64) on one core. Another machine scales all of them alike, roughly; only their ratios decide.
``tools/benchmark_moe.py auto`` measures how good the decisions are.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.layout import memory_format_of

if TYPE_CHECKING:
    from mmdet_moe.moe.experts.conv import ConvExperts

#: Milliseconds per unit, of each way (forward, forward and backward) of these terms in this order:
#:
#: * subbatches: the call, an expert that has items, a GFLOP, a million numbers in the kernels of
#:   those experts, a million numbers in the outputs of all routes
#: * grouped and views: the call, an item, a GFLOP, a million numbers in the mixed kernels of all
#:   items, the same times k (to mix them), a million numbers in the outputs of all items
#: * grouped, last: the numbers in the mixed kernels times E (million multiplications of a matrix
#:   product, to take the mixing back)
_COSTS: dict[
    tuple[torch.dtype, torch.memory_format],
    dict[str, tuple[tuple[float, ...], tuple[float, ...]]],
] = {
    (torch.float32, torch.contiguous_format): {
        'subbatches': ((0.054, 0.059, 3.3, 0.37, 0.86), (0.5, 0.17, 9.1, 1.4, 3.4)),
        'grouped': (
            (0.14, 0.003, 3.4, 0.51, 0.1, 0.55, 0.0),
            (0.53, 0.004, 10.8, 1.6, 0.1, 1.5, 0.11),
        ),
        'views': ((0.092, 0.022, 4.2, 0.22, 0.11, 0.95), (0.36, 0.078, 13.2, 0.93, 0.48, 2.6)),
    },
    (torch.bfloat16, torch.contiguous_format): {
        'subbatches': ((0.18, 0.17, 2.3, 0.42, 3.3), (1.2, 0.38, 4.1, 5.2, 8.5)),
        'grouped': (
            (0.33, 0.0041, 0.72, 0.3, 0.69, 4.6, 0.0),
            (1.3, 0.0032, 2.2, 0.0, 0.95, 12.0, 0.41),
        ),
        'views': ((0.26, 0.14, 1.8, 0.024, 0.88, 2.6), (0.98, 0.45, 9.6, 1.4, 16.0, 6.1)),
    },
    (torch.float32, torch.channels_last): {
        'subbatches': ((0.26, 0.015, 7.7, 1.6, 2.2), (0.65, 0.047, 23.0, 6.4, 6.9)),
        'grouped': (
            (0.21, 0.0017, 8.9, 0.65, 0.44, 3.6, 0.0),
            (0.67, 0.0045, 27.0, 3.4, 0.047, 7.9, 0.15),
        ),
        'views': ((0.15, 0.024, 9.6, 0.44, 0.43, 0.94), (0.53, 0.083, 32.0, 1.5, 2.4, 3.1)),
    },
    (torch.bfloat16, torch.channels_last): {
        'subbatches': ((0.42, 0.075, 1.0, 2.0, 1.5), (1.3, 0.23, 3.8, 8.7, 4.2)),
        'grouped': (
            (0.34, 0.0029, 2.8, 1.5, 0.39, 5.5, 0.0),
            (1.3, 0.00077, 9.0, 5.4, 0.25, 13.0, 0.066),
        ),
        'views': ((0.2, 0.086, 1.4, 1.7, 0.44, 0.81), (0.77, 0.3, 4.2, 7.9, 3.2, 2.4)),
    },
}
#: The mixed kernels of all items have to be in memory at once, until the backward pass.
MOST_MIXED_BYTES = 1 << 28


def cheapest(experts: 'ConvExperts', x_T: Tensor, dispatcher: Dispatcher) -> str:
    """The way that is expected to be the fastest: ``'subbatches'``, ``'grouped'`` or ``'views'``.

    On anything but a CPU it is ``'subbatches'``, whose work is the active FLOPs: on an H200 neither
    of the others was faster for all sizes (``docs/gpu.md``).

    Args:
        experts: The experts.
        x_T: Their input, (T, C, H, W).
        dispatcher: Where the items go.
    """
    num_items = x_T.shape[0]
    if x_T.device.type != 'cpu' or num_items == 0:
        return 'subbatches'
    return _cheapest(
        torch.is_grad_enabled() and (x_T.requires_grad or experts.weight.requires_grad),
        num_items,
        dispatcher.bounds[-1],
        dispatcher.top_k,
        dispatcher.num_experts,
        len(dispatcher.used_experts()),
        tuple(experts.weight.shape[1:]),
        experts.weight.element_size(),
        (_computed_in(x_T.dtype), memory_format_of(x_T)),
        math.prod(experts.output_size(x_T.shape[2:])),
    )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Of the two that have been measured, the one that is closer to what a CPU computes in."""
    if torch.is_autocast_enabled('cpu'):
        dtype = torch.get_autocast_dtype('cpu')
    return torch.bfloat16 if dtype in (torch.bfloat16, torch.float16) else torch.float32


@lru_cache(maxsize=1024)  # a model repeats its few shapes, and this takes as long as it saves
def _cheapest(
    trains: bool,
    num_items: int,
    num_rows: int,
    k: int,
    num_experts: int,
    used: int,
    kernel_shape: tuple[int, ...],
    kernel_bytes: int,
    kind: tuple[torch.dtype, torch.memory_format],
    pixels: int,
) -> str:
    kernel = math.prod(kernel_shape) / 1e6
    gflop = 2e-3 * kernel * pixels  # of one item and one expert
    output = kernel_shape[0] * pixels / 1e6
    items_kernel = num_items * kernel
    mixed = (1, num_items, num_items * gflop, items_kernel, k * items_kernel, num_items * output)
    amounts = {
        'subbatches': (1, used, num_rows * gflop, used * kernel, num_rows * output),
        'grouped': (*mixed, num_experts * items_kernel),
        'views': mixed,
    }
    costs = {
        way: sum(
            cost * amount for cost, amount in zip(_COSTS[kind][way][trains], of_way, strict=True)
        )
        for way, of_way in amounts.items()
    }
    if num_items * 1e6 * kernel * kernel_bytes > MOST_MIXED_BYTES:
        del costs['grouped']
    return min(costs, key=costs.__getitem__)
