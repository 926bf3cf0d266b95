"""One dense module in the place of experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdet_moe.moe.layer import MoELayer


def dense_prefix(layer: MoELayer, path: str) -> str:
    """What the names of the dense module that a layer replaced begin with, with the dot.

    Args:
        layer: The layer.
        path: Where in the model it is.
    """
    if layer.siblings:
        path = path.rpartition('.')[0]
    return f'{path}.' if path else ''


def merged_entries(layer: MoELayer, weights: Sequence[float]) -> dict[str, Tensor]:
    """Parameters and buffers of one module that stands for all experts, by their dense names.

    Each is the weighted mean of the experts'. Dense experts beside them (``shared``) count as they
    do in the layer: all routed experts together as much as each of them. Of linear experts that
    makes the mean of their outputs, of others what it is worth has to be measured. What is no
    number with a fraction (the count of batches) is that of the expert with the largest weight.

    Args:
        layer: The layer.
        weights: One for each expert, at least 0; their sum is made 1.
    """
    experts, scope = layer.experts, layer.experts.dense_scope
    total, best = sum(weights), max(range(len(weights)), key=weights.__getitem__)
    shared = [module.state_dict() for module in layer.shared or ()]
    of_experts = [experts.entries(e) for e in range(layer.num_experts)]
    merged = {}
    for name, value in of_experts[best].items():
        merged[scope + name] = value.clone()
        if value.is_floating_point():
            parts = [
                w / total * of[name].double() for w, of in zip(weights, of_experts, strict=True)
            ]
            others = [state[scope + name].double() for state in shared]
            mean = torch.stack([sum(parts[1:], parts[0]), *others]).mean(0)
            merged[scope + name] = mean.to(value.dtype)
    return merged
