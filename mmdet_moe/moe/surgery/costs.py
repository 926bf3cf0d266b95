"""What layers of experts cost: the chosen experts, the worst choice, and all of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.flops import counting
from mmdet_moe.moe.layer import MoELayer, find_moe_layers
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.surgery.report import Row, in_columns, report_of, scaled


@dataclass(frozen=True)
class Cost:
    """The costs of one layer of experts, or of the whole model.

    Parameters are those of the layer, FLOPs those of one forward pass in eval mode, a
    multiplication and an addition counted as two.

    Attributes:
        row: What it is; its ``active`` and ``flops`` are those of the decisions that were made, its
            ``total`` all parameters.
        worst: Parameters of all experts that the decisions on one image can need together.
        worst_flops: Of the dearest decisions. Where experts are alike they cost what any others do,
            but for ``whole_maps``, with which each expert that anybody chose computes all of a map.
        all_flops: Of every expert on every item.
    """

    row: Row
    worst: int
    worst_flops: int
    all_flops: int


def costs_of(model: nn.Module, run: Callable[[], Any]) -> list[Cost]:
    """The costs of each layer of experts, and last those of the whole model.

    Args:
        model: Any module with layers of experts; left as it was.
        run: Runs it once, on a batch of one image.
    """
    report = report_of(model, run)
    layers = {name: m for name, m in find_moe_layers(model).items() if m.num_experts > 1}
    orders = {name: list(range(layer.num_experts)) for name, layer in layers.items()}
    # In the order of their FLOPs, which stacked experts have not each for itself.
    everything, _ = _count(model, run, layers, partial(_every, orders))
    for name, order in orders.items():
        of_experts = [everything.get(f'{name}.experts.{e}', 0) for e in order]
        order.sort(key=of_experts.__getitem__, reverse=True)
    dearest, items = _count(model, run, layers, partial(_dearest, layers, orders))
    costs, more = [], 0
    for row in report.rows:
        worst = row.total
        if row.path in layers:
            worst -= _idle(layers[row.path], items[row.path])
        more += row.total - worst
        flops = dearest.get(row.path, 0), everything.get(row.path, 0)
        costs.append(Cost(row, worst, *flops))
    whole = report.whole
    return [*costs, Cost(whole, whole.total - more, dearest.get('', 0), everything.get('', 0))]


def cost_table(costs: list[Cost]) -> str:
    """The costs as text."""
    head = ('path', 'layer', 'E', 'k', 'decides per')
    numbers_of = ('parameters: dense', 'active', 'worst', 'all', 'GFLOPs: dense')
    lines: list[tuple[str, ...]] = [(*head, *numbers_of, 'active', 'worst', 'all')]
    for cost in costs:
        row = cost.row
        experts = ' × '.join(map(str, row.levels or (row.num_experts or '',)))
        chosen = 'all' if row.levels else str(row.top_k or '')
        parameters = row.dense, row.active, cost.worst, row.total
        flops = row.dense_flops, row.flops, cost.worst_flops, cost.all_flops
        numbers = [scaled(n, 1e6, ' M') for n in parameters] + [scaled(n, 1e9) for n in flops]
        lines.append((row.path, row.kind, experts, chosen, row.granularity, *numbers))
    return in_columns(lines)


def _count(
    model: nn.Module,
    run: Callable[[], Any],
    layers: dict[str, MoELayer],
    decide: Callable[[str, Routing], Tensor],
) -> tuple[dict[str, int], Counter]:
    """FLOPs by module with other decisions, and how many decisions each layer made."""
    items: Counter = Counter()
    with _deciding(layers, decide, items), counting(model) as counter:
        run()
    return counter.by_module(model), items


@contextmanager
def _deciding(
    layers: dict[str, MoELayer], decide: Callable[[str, Routing], Tensor], items: Counter
) -> Iterator[None]:
    def change(name: str, _: nn.Module, __: tuple, routing: Routing) -> Routing:
        items[name] += routing.num_items
        ids = decide(name, routing).to(routing.expert_ids.device)
        weights = torch.full_like(ids, 1, dtype=routing.weights.dtype) / ids.shape[1]
        return replace(routing, expert_ids=ids, weights=weights, gates=None)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.router.register_forward_hook(partial(change, name)).remove)
            stack.callback(layer.forget)
        yield


def _every(orders: dict[str, list[int]], name: str, routing: Routing) -> Tensor:
    """All experts for each item."""
    return torch.tensor(orders[name]).repeat(routing.num_items, 1)


def _dearest(
    layers: dict[str, MoELayer], orders: dict[str, list[int]], name: str, routing: Routing
) -> Tensor:
    """The dearest k experts for each item; on whole maps as many dear ones as there can be."""
    layer, order = layers[name], torch.tensor(orders[name])
    places = torch.arange(layer.top_k)
    if not layer.whole_maps:
        return order[places].repeat(routing.num_items, 1)
    item = torch.cat([torch.arange(n) for n in routing.items_per_level])
    return order[(item[:, None] * layer.top_k + places) % len(order)]


def _idle(layer: MoELayer, items: int) -> int:
    """Parameters of the smallest experts, beyond those that so many decisions can need."""
    experts, used = layer.experts, min(layer.num_experts, layer.top_k * items)
    if isinstance(experts, ModuleExperts):
        sizes = sorted(sum(p.numel() for p in expert.parameters()) for expert in experts)
        return sum(sizes[: len(sizes) - used])
    total = sum(p.numel() for p in experts.parameters())
    return total * (layer.num_experts - used) // layer.num_experts
