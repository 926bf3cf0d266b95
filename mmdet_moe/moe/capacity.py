"""A bound on what one expert computes in one forward pass."""

import math

import torch
from torch import Tensor

from mmdet_moe import ops
from mmdet_moe.moe.routing import Routing


def overflow(routing: Routing, capacity_factor: float) -> Tensor:
    """Which routes exceed the capacity of their expert, the least weighted first.

    The capacity is ``ceil(capacity_factor · T · K / E)`` items for each expert (arXiv 2101.03961,
    equation 3, with K choices as in arXiv 2006.16668), over all levels together: an expert may
    specialise in one of them.

    Args:
        routing: What was decided.
        capacity_factor: 1 gives every expert its fair share of the items.

    Returns:
        bool (T, K). Among equal weights the later item is dropped, but with k = 1 the one of lower
        probability first: with ``softmax='straight_through'`` all weights are 1. A weight of
        exactly 0 takes no capacity.
    """
    weights = routing.weights.detach().flatten()
    fair = weights.numel() / routing.num_experts
    capacity = math.ceil(capacity_factor * fair)
    by_weight = weights.argsort(descending=True, stable=True)
    if routing.top_k == 1:
        p = routing.logits.detach().softmax(dim=-1).gather(1, routing.expert_ids)
        order = p.flatten().argsort(descending=True, stable=True)
        by_weight = order[weights[order].argsort(descending=True, stable=True)]
    chosen = routing.expert_ids.flatten().masked_fill(weights == 0, -1)[by_weight]
    offsets, position = ops.sort_routes(chosen[:, None], routing.num_experts)
    # The sort is stable: inside an expert, routes stay in the order of their weights.
    rank = position.flatten() - offsets[chosen.clamp(min=0)]
    dropped = torch.empty_like(weights, dtype=torch.bool)
    dropped[by_weight] = (rank >= capacity) & (chosen >= 0)
    return dropped.view_as(routing.weights)
