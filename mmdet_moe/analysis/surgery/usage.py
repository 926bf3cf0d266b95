"""How much a model uses its experts."""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import nn

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.measuring import predict
from mmdet_moe.analysis.records.contents import BoxRecords
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, Routing

USAGE = ('load', 'importance')


def observed(
    model: nn.Module, data: AnalysisData, layers: dict[str, MoELayer]
) -> tuple[BoxRecords | np.ndarray, dict[str, dict[str, list[float]]]]:
    """What a model predicts, and how much it uses its experts for that.

    Args:
        model: The model, for evaluation.
        data: The images.
        layers: Its layers by name.

    Returns:
        The predictions, see :func:`~mmdet_moe.analysis.measuring.predict`, and by layer the load of
        each expert, the share of the items that it got, and its importance, the share of the
        weights.

    Raises:
        ConfigError: If a layer was not run.
    """
    sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(name: str, routing: Routing, _: list) -> None:
        sums[name].append(torch.stack([routing.load(), routing.importance()]).double().cpu())

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.observe(partial(add, name)).remove)
        found = predict(model, data, 'as it was')
    usage = {}
    for name in layers:
        if name not in sums:
            raise ConfigError(f'layer "{name}" was not run on any image')
        total = sum(sums[name])
        # Of the items, each of which loads k experts, and of all weights.
        total[0] /= (total[0].sum() / layers[name].top_k).clamp(min=1)
        total[1] /= total[1].sum().clamp(min=torch.finfo(total.dtype).tiny)
        usage[name] = dict(zip(USAGE, total.tolist(), strict=True))
    return found, usage
