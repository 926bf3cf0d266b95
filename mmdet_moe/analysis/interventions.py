"""What happens if experts are used in another way: alone, all alike, one removed, at random.

An intervention replaces the decisions of routers while it is active, by a hook; it touches no
weight and no buffer of the model. In all of them the weights of an item keep their sum, so the
outputs keep their scale (with ``softmax='over_all'`` the weights sum to less than 1).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmdet_moe.analysis.attribution import replaced
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.metrics import shares
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing

#: Name of the interventions on all layers together.
ALL = 'all'
#: Outputs of experts that one batch may keep.
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True)
class Intervention:
    """One change of the routing.

    Attributes:
        layer: Name of the MoE layer, or :data:`ALL`.
        kind: ``'only'``: every item goes to one expert alone. ``'equal'``: to all E experts with
            equal weights. ``'without'``: the router chooses the k best of the other experts.
            ``'random'``: k experts drawn uniformly for each item, with the router's weights.
        expert: Which expert, for ``'only'`` and ``'without'``.
    """

    layer: str
    kind: str
    expert: int | None = None

    def __call__(self, routing: Routing, router: Router, generator: torch.Generator) -> Routing:
        """The changed decision."""
        items, experts = routing.logits.shape
        device = routing.expert_ids.device
        if self.kind == 'only':
            ids = torch.full((items, 1), self.expert, device=device)
            return _shared(routing, ids, torch.ones_like(routing.weights[:, :1]))
        if self.kind == 'equal':
            ids = torch.arange(experts, device=device).repeat(items, 1)
            return _shared(routing, ids, torch.full_like(routing.logits, 1 / experts))
        if self.kind == 'random':
            order = torch.rand(items, experts, generator=generator).argsort(dim=1)
            return replace(routing, expert_ids=order[:, : routing.top_k].to(device))
        logits = routing.logits.clone()
        logits[:, self.expert] = float('-inf')
        ids, weights = router.choose(logits, training=False)
        return _shared(routing, ids, shares(weights))


def _shared(routing: Routing, expert_ids: Tensor, shares_TK: Tensor) -> Routing:
    """Other experts, which share the sum of each item's weights, and that of its gates."""
    return replace(
        routing,
        expert_ids=expert_ids,
        weights=shares_TK * routing.weights.sum(1, keepdim=True),
        gates=None if routing.gates is None else shares_TK * routing.gates.sum(1, keepdim=True),
    )


def interventions_on(layers: dict[str, MoELayer]) -> list[Intervention]:
    """All that are made on a model: every kind on each layer, and two on all layers together."""
    found = []
    choosing = {name: layer for name, layer in layers.items() if layer.num_experts > 1}
    for name, layer in choosing.items():
        experts = range(layer.num_experts)
        found += [Intervention(name, 'only', e) for e in experts]
        found.append(Intervention(name, 'equal'))
        found += [Intervention(name, 'without', e) for e in experts]
        found.append(Intervention(name, 'random'))
    if len(choosing) > 1:
        found += [Intervention(ALL, 'equal'), Intervention(ALL, 'random')]
    return found


@contextmanager
def applied(
    intervention: Intervention, layers: dict[str, MoELayer], seed: Sequence[int] = (0,)
) -> Iterator[None]:
    """Make the layers decide as the intervention says, until the end of the block.

    Args:
        intervention: What to change.
        layers: The model's MoE layers by name.
        seed: Numbers that fix what ``'random'`` draws.
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**63)
    with ExitStack() as stack:
        for name, layer in layers.items():
            if intervention.layer in (name, ALL) and layer.num_experts > 1:

                def change(router: nn.Module, _: tuple, routing: Routing) -> Routing:
                    return intervention(routing, router, generator)

                stack.callback(layer.router.register_forward_hook(change).remove)
        yield


@contextmanager
def experts_remembered(layers: dict[str, MoELayer]) -> Iterator[None]:
    """Let every expert compute the same input once, however often the routing is changed.

    A layer's output is a weighted sum of its experts' outputs, so as long as a layer is given the
    input that it was given before, other decisions only need other weights. Outputs beyond
    :data:`MEMORY_BYTES` are not kept but computed again.
    """
    with ExitStack() as stack:
        budget = [MEMORY_BYTES]
        for layer in layers.values():
            stack.enter_context(replaced(layer, '_mix', _Memory(layer, budget)))
        yield


class _Memory:
    """Stands in for ``MoELayer._mix``."""

    def __init__(self, layer: MoELayer, budget: list[int]) -> None:
        self._layer = layer
        self._mix = layer._mix
        self._budget = budget  # bytes, shared by all layers
        self._calls = 0
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}

    def __call__(self, x: Tensor, items: Items, expert_ids: Tensor, weights: Tensor) -> Tensor:
        index = self._calls % len(self._layer.routing.items_per_level)
        self._calls += 1
        known = self._inputs.setdefault(index, x)
        weights_TE = weights.new_zeros(len(weights), self._layer.num_experts)
        weights_TE.scatter_add_(1, expert_ids, weights)
        used = weights_TE.any(dim=0).nonzero().flatten().tolist()
        if not used or not (known is x or torch.equal(known, x)):
            return self._mix(x, items, expert_ids, weights)
        total: Tensor | None = None
        crops = items.crop(x)
        for expert in used:
            y = self._output(index, expert, crops)
            part = y * weights_TE[:, expert].to(y.dtype).reshape(-1, *[1] * (y.dim() - 1))
            total = part if total is None else total.add_(part)
        placed = items.place(total)
        shortcut = self._layer.shortcut
        return placed if shortcut is None else placed + shortcut(x)

    def _output(self, index: int, expert: int, crops: Tensor) -> Tensor:
        if (index, expert) in self._outputs:
            return self._outputs[index, expert]
        ids = torch.full((len(crops), 1), expert, device=crops.device)
        ones = torch.ones(ids.shape, device=crops.device)
        y = self._layer.experts(crops, Dispatcher(ids, ones, self._layer.num_experts))
        size = y.numel() * y.element_size()
        if size <= self._budget[0]:
            self._budget[0] -= size
            self._outputs[index, expert] = y
        return y
