"""What happens if experts are used in another way: alone, all alike, one removed, at random.

An intervention replaces the decisions of a layer while it is active; it touches no weight and no
buffer of the model. In all of them but one the weights of an item keep their sum, so the outputs
keep their scale (with ``softmax='over_all'`` the weights sum to less than 1). ``'zeroed'`` takes
what one expert contributes out of the sum and puts nothing in its place.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.analysis.attribution import replaced
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher, unpack
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.metrics import shares
from mmdet_moe.moe.mumoe import MuMoE
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing

#: Name of the interventions on all layers together.
ALL = 'all'
#: Inputs and outputs of experts that one batch may keep.
MEMORY_BYTES = 2 << 30
#: A layer of more experts has no interventions that are made for each expert, but ``'zeroed'``.
MANY_EXPERTS = 32


@dataclass(frozen=True)
class Intervention:
    """One change of the routing.

    Attributes:
        layer: Name of the layer, or :data:`ALL`.
        kind: ``'only'``: every item goes to one expert alone. ``'equal'``: to all E experts with
            equal weights. ``'without'``: the router chooses the k best of the other experts.
            ``'random'``: k experts drawn uniformly for each item, with the router's weights. Of a
            μMoE layer: each item's coefficients are permuted among the experts of each level.
            ``'zeroed'``: the expert's contribution is 0, whatever its weight (arXiv 2402.12550,
            section 4.1.2); nobody takes its place.
        expert: Which expert, for ``'only'``, ``'without'`` and ``'zeroed'``.
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
        if self.kind == 'zeroed':
            is_zero, gates = routing.expert_ids == self.expert, routing.gates
            return replace(
                routing,
                weights=routing.weights.masked_fill(is_zero, 0),
                gates=None if gates is None else gates.masked_fill(is_zero, 0),
            )
        logits = routing.logits.clone()
        logits[:, self.expert] = float('-inf')
        ids, weights = router.choose(logits, training=False)
        return _shared(routing, ids, shares(weights))

    def mix(
        self, layer: MuMoE, usual: Callable, generator: torch.Generator, x: Tensor,
        coefficients: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Stands in for the ``mix`` of a μMoE layer; ``usual`` is that of the layer itself."""
        if self.kind == 'zeroed':
            return layer.mix_without(x, coefficients, self.expert)
        if self.kind == 'only':
            place = layer.experts.place(self.expert)
            changed = [torch.zeros_like(a) for a in coefficients]
            for a, expert in zip(changed, place, strict=True):
                a[..., expert] = 1
        elif self.kind == 'equal':
            changed = [torch.full_like(a, 1 / a.shape[-1]) for a in coefficients]
        else:
            orders = [torch.rand(a.shape, generator=generator).argsort(-1) for a in coefficients]
            pairs = zip(coefficients, orders, strict=True)
            changed = [a.gather(-1, order.to(a.device)) for a, order in pairs]
        return usual(x, tuple(changed))


def _shared(routing: Routing, expert_ids: Tensor, shares_TK: Tensor) -> Routing:
    """Other experts, which share the sum of each item's weights, and that of its gates."""
    return replace(
        routing,
        expert_ids=expert_ids,
        weights=shares_TK * routing.weights.sum(1, keepdim=True),
        gates=None if routing.gates is None else shares_TK * routing.gates.sum(1, keepdim=True),
    )


def interventions_on(
    layers: dict[str, ExpertLayer], zeroed: dict[str, Sequence[int]] | None = None
) -> list[Intervention]:
    """All that are made on a model: every kind on each layer, and two on all layers together.

    Layers of more than :data:`MANY_EXPERTS` experts have neither ``'only'`` nor ``'without'``. The
    latter no μMoE layer has, which chooses nobody.

    Args:
        layers: The model's layers by name.
        zeroed: Which experts of a layer are zeroed, one after the other; by default all.
    """
    found = []
    choosing = {name: layer for name, layer in layers.items() if layer.num_experts > 1}
    for name, layer in choosing.items():
        every = range(layer.num_experts)
        experts = every if layer.num_experts <= MANY_EXPERTS else ()
        found += [Intervention(name, 'only', e) for e in experts]
        found.append(Intervention(name, 'equal'))
        if isinstance(layer, MoELayer):
            found += [Intervention(name, 'without', e) for e in experts]
        found.append(Intervention(name, 'random'))
        found += [Intervention(name, 'zeroed', e) for e in (zeroed or {}).get(name, every)]
    if len(choosing) > 1:
        found += [Intervention(ALL, 'equal'), Intervention(ALL, 'random')]
    return found


@contextmanager
def applied(
    intervention: Intervention, layers: dict[str, ExpertLayer], seed: Sequence[int] = (0,)
) -> Iterator[None]:
    """Make the layers decide as the intervention says, until the end of the block.

    Args:
        intervention: What to change.
        layers: The model's layers of experts by name.
        seed: Numbers that fix what ``'random'`` draws.
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**63)
    with ExitStack() as stack:
        for name, layer in layers.items():
            if intervention.layer not in (name, ALL) or layer.num_experts < 2:
                continue
            if isinstance(layer, MuMoE):
                mix = partial(intervention.mix, layer, layer.mix, generator)
                stack.enter_context(replaced(layer, 'mix', mix))
                continue

            def change(router: nn.Module, _: tuple, routing: Routing) -> Routing:
                return intervention(routing, router, generator)

            stack.callback(layer.router.register_forward_hook(change).remove)
        yield


@contextmanager
def decisions_noted(layers: Mapping[str, MoELayer]) -> Iterator[dict[str, list[Routing]]]:
    """Note what layers decide in the block, by layer and call."""
    noted: dict[str, list[Routing]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            note = noted[name].append
            stack.callback(layer.observe(lambda routing, _, note=note: note(routing)).remove)
        yield noted


@contextmanager
def decisions_held(
    layers: Mapping[str, MoELayer], decisions: Mapping[str, Sequence[Routing]]
) -> Iterator[None]:
    """Make layers decide in each pass of the block as they did in one before, call by call.

    The weights are those of that pass, too, and constants: no gradient goes through the routers.

    Args:
        layers: By name.
        decisions: Of one pass, as :func:`decisions_noted` gives them. A pass over another number of
            items decides for itself.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            # As many calls in each pass, which follow each other.
            calls = cycle(decisions[name])

            def hold(_: nn.Module, __: tuple, own: Routing, calls: Iterator = calls) -> Routing:
                held = next(calls)
                if held.num_items != own.num_items:
                    return own
                gates = None if held.gates is None else held.gates.detach()
                return replace(
                    own, expert_ids=held.expert_ids, weights=held.weights.detach(), gates=gates
                )

            stack.callback(layer.router.register_forward_hook(hold).remove)
        yield


@contextmanager
def experts_remembered(model: nn.Module, layers: dict[str, ExpertLayer]) -> Iterator[None]:
    """Let every expert compute the same input once, however often the routing is changed.

    A layer's output is a weighted sum of its experts' outputs, so as long as a layer is given an
    input that it was given before, other decisions only need other weights. The inputs that are
    remembered are those of the model's first forward pass; beyond :data:`MEMORY_BYTES` nothing is
    kept, but computed again.

    Args:
        model: Which is run.
        layers: Its layers by name; μMoE layers, whose experts compute nothing alone, stay as they
            are.
    """
    memory = _Memory()
    with ExitStack() as stack:
        for layer in layers.values():
            if not isinstance(layer, MoELayer):
                continue
            run = partial(memory.run_experts, layer, layer.run_experts)
            stack.enter_context(replaced(layer, 'run_experts', run))
        stack.callback(model.register_forward_hook(memory.stop_learning).remove)
        yield


class _Memory:
    """Stands in for ``MoELayer.run_experts`` of all layers."""

    def __init__(self) -> None:
        self._learns = True
        self._left = MEMORY_BYTES
        # By layer: inputs, each with its versions, and what the experts made of it.
        self._known: dict[MoELayer, list[tuple[list, list, dict[int, Any]]]] = defaultdict(list)

    def stop_learning(self, *_: Any) -> None:
        self._learns = False

    def run_experts(
        self, layer: MoELayer, usual: Callable, x_T: Tensor, dispatcher: Dispatcher, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        weights = dispatcher.weights
        weights_TE = weights.new_zeros(len(weights), layer.num_experts)
        weights_TE.scatter_add_(1, dispatcher.expert_ids, weights)
        used = weights_TE.any(dim=0).nonzero().flatten().tolist()
        outputs = self._outputs(layer, tree_leaves((x_T, args, kwargs)))
        if not len(x_T) or (outputs is None and used):
            return usual(x_T, dispatcher, *args, **kwargs)
        outputs = {} if outputs is None else outputs
        total: Tensor | None = None
        # If nobody has a say, because the only expert is zeroed: 0 times what any of them gives.
        for expert in used or [0]:
            output = outputs.get(expert)
            if output is None:
                ids = torch.full((len(x_T), 1), expert, device=x_T.device)
                ones = weights.new_ones(ids.shape)
                output = usual(x_T, Dispatcher(ids, ones, layer.num_experts), *args, **kwargs)
                if self._has_room(output):
                    outputs[expert] = output
            y, rebuild = unpack(output)
            part = y * weights_TE[:, expert].to(y.dtype).reshape(-1, *[1] * (y.dim() - 1))
            total = part if total is None else total.add_(part)
        return rebuild(total)

    def _outputs(self, layer: MoELayer, inputs: list) -> dict[int, Any] | None:
        """What is known by expert of these inputs; None if they are not remembered."""
        for known, before, outputs in self._known[layer]:
            # The model may have changed in place what it gave to the layer.
            is_intact = before == versions(known) and len(known) == len(inputs)
            if is_intact and all(map(_same, known, inputs)):
                return outputs
        if not self._learns or not self._has_room(inputs):
            return None
        outputs = {}
        self._known[layer].append((inputs, versions(inputs), outputs))
        return outputs

    def _has_room(self, kept: Any) -> bool:
        """Whether it may be kept, which then is counted."""
        tensors = [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self._left:
            return False
        self._left -= size
        return True


def versions(inputs: Any) -> list[int]:
    """What changes when a tensor in a structure is changed in place."""
    return [leaf._version for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b
