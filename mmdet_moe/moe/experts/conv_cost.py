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

#: Milliseconds: (forward, forward and backward).
_COSTS: dict[tuple[torch.dtype, torch.memory_format], dict[str, dict[str, tuple[float, float]]]] = {
    (torch.float32, torch.contiguous_format): {
        'subbatches': {
            'call': (0.054, 0.50),
            'expert': (0.059, 0.17),  # that has items
            'gflop': (3.3, 9.1),
            'expert_kernel': (0.37, 1.4),  # million numbers in the kernels of those experts
            'route_pixel': (0.86, 3.4),  # million numbers in the outputs of all routes
        },
        'grouped': {
            'call': (0.14, 0.53),
            'item': (0.003, 0.004),
            'gflop': (3.4, 10.8),
            'item_kernel': (0.51, 1.6),  # million numbers in the mixed kernels of all items
            'mixing': (0.1, 0.1),  # times k
            'unmixing': (0.0, 0.11),  # times E: million multiplications of a matrix product
            'item_pixel': (0.55, 1.5),  # million numbers in the outputs of all items
        },
        'views': {
            'call': (0.092, 0.36),
            'item': (0.022, 0.078),
            'gflop': (4.2, 13.2),
            'item_kernel': (0.22, 0.93),
            'mixing': (0.11, 0.48),  # times k
            'item_pixel': (0.95, 2.6),
        },
    },
    (torch.bfloat16, torch.contiguous_format): {
        'subbatches': {
            'call': (0.18, 1.2),
            'expert': (0.17, 0.38),
            'gflop': (2.3, 4.1),
            'expert_kernel': (0.42, 5.2),
            'route_pixel': (3.3, 8.5),
        },
        'grouped': {
            'call': (0.33, 1.3),
            'item': (0.0041, 0.0032),
            'gflop': (0.72, 2.2),
            'item_kernel': (0.3, 0.0),
            'mixing': (0.69, 0.95),
            'item_pixel': (4.6, 12.0),
            'unmixing': (0.0, 0.41),
        },
        'views': {
            'call': (0.26, 0.98),
            'item': (0.14, 0.45),
            'gflop': (1.8, 9.6),
            'item_kernel': (0.024, 1.4),
            'mixing': (0.88, 16.0),
            'item_pixel': (2.6, 6.1),
        },
    },
    (torch.float32, torch.channels_last): {
        'subbatches': {
            'call': (0.26, 0.65),
            'expert': (0.015, 0.047),
            'gflop': (7.7, 23.0),
            'expert_kernel': (1.6, 6.4),
            'route_pixel': (2.2, 6.9),
        },
        'grouped': {
            'call': (0.21, 0.67),
            'item': (0.0017, 0.0045),
            'gflop': (8.9, 27.0),
            'item_kernel': (0.65, 3.4),
            'mixing': (0.44, 0.047),
            'item_pixel': (3.6, 7.9),
            'unmixing': (0.0, 0.15),
        },
        'views': {
            'call': (0.15, 0.53),
            'item': (0.024, 0.083),
            'gflop': (9.6, 32.0),
            'item_kernel': (0.44, 1.5),
            'mixing': (0.43, 2.4),
            'item_pixel': (0.94, 3.1),
        },
    },
    (torch.bfloat16, torch.channels_last): {
        'subbatches': {
            'call': (0.42, 1.3),
            'expert': (0.075, 0.23),
            'gflop': (1.0, 3.8),
            'expert_kernel': (2.0, 8.7),
            'route_pixel': (1.5, 4.2),
        },
        'grouped': {
            'call': (0.34, 1.3),
            'item': (0.0029, 0.00077),
            'gflop': (2.8, 9.0),
            'item_kernel': (1.5, 5.4),
            'mixing': (0.39, 0.25),
            'item_pixel': (5.5, 13.0),
            'unmixing': (0.0, 0.066),
        },
        'views': {
            'call': (0.2, 0.77),
            'item': (0.086, 0.3),
            'gflop': (1.4, 4.2),
            'item_kernel': (1.7, 7.9),
            'mixing': (0.44, 3.2),
            'item_pixel': (0.81, 2.4),
        },
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
    mixed = {
        'call': 1,
        'item': num_items,
        'gflop': num_items * gflop,
        'item_kernel': num_items * kernel,
        'mixing': num_items * k * kernel,
        'item_pixel': num_items * output,
    }
    amounts = {
        'subbatches': {
            'call': 1,
            'expert': used,
            'gflop': num_rows * gflop,
            'expert_kernel': used * kernel,
            'route_pixel': num_rows * output,
        },
        'grouped': {**mixed, 'unmixing': num_items * num_experts * kernel},
        'views': mixed,
    }
    costs = {
        way: sum(_COSTS[kind][way][name][trains] * amount for name, amount in of_way.items())
        for way, of_way in amounts.items()
    }
    if num_items * 1e6 * kernel * kernel_bytes > MOST_MIXED_BYTES:
        del costs['grouped']
    return min(costs, key=costs.__getitem__)
