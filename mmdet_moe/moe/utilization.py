"""Compact statistics of how experts are used; memory does not grow with the number of items."""

import math
from dataclasses import asdict, dataclass, field

import torch
from mmengine.dist import all_gather_object, get_comm_device
from torch import Tensor

from mmdet_moe.moe.distributed import global_sum_, is_distributed
from mmdet_moe.moe.metrics import (
    coefficient_of_variation_squared,
    entropy,
    mutual_information,
    shares,
)
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing

#: An expert with less than this fraction of the fair load 1 / E counts as dead.
DEAD_SHARE = 0.01
#: Of more experts than this only the extremes are told in a line, and no scalar of each.
FEW_EXPERTS = 32
#: Training and inference disagree from this distance of their loads (total variation) on.
DISAGREEMENT = 0.2
#: Routing whose decision says less on the input than this fraction of log E has collapsed.
COLLAPSE_SHARE = 0.02
_CONSTRAINT = 'constraint/'  # begins the names of its sums


@dataclass(frozen=True)
class UtilizationReport:
    """How the experts of one layer were used. Entropies and informations are in nats.

    Attributes:
        num_items: Routed items T.
        load: Share of the routed rows that each expert got, sums to 1.
        importance: Share of the importance, sums to 1.
        load_cv2: Squared coefficient of variation of the load.
        usage_entropy: Entropy of ``importance``; log E when all experts are used alike.
        decision_entropy: Mean entropy of one item's weights; log k when its k experts weigh alike.
        mi_input: Mutual information between the input and the chosen expert, ``H(mean w) −
            mean H(w)``, of the decisions that inference would take (no noise, no masks). 0 when
            every input gets the same experts with the same weights.
        mi_level: The part of it that the pyramid level alone explains.
        level_shares: For each pyramid level, the share of its decisions that goes to each expert,
            (L, E), again as inference would decide; rows sum to 1.
        dropped: Share of the routed rows that exceeded the capacity of their expert.
        inference_load: The load that the decisions of inference would give (no noise, no masks).
            Empty in files of earlier versions.
        mi_source: Mutual information between the data set that an image comes from and the chosen
            expert, as inference would decide; None where the images come from one, or where nobody
            said from which (:attr:`Routing.sources`).
        source_shares: For each data set, the share of its decisions by expert, (D, E).
        constraint: In training, what the router's constraint has for each expert (E,) after a
            batch, averaged over the batches: ``'masked'`` of hard ones, the share of the batches
            after which it is masked; ``'bias'`` of the loss-free one.
    """

    num_items: int
    load: list[float]
    importance: list[float]
    load_cv2: float
    usage_entropy: float
    decision_entropy: float
    mi_input: float
    mi_level: float
    level_shares: list[list[float]]
    dropped: float = 0.0
    inference_load: list[float] = field(default_factory=list)
    mi_source: float | None = None
    source_shares: list[list[float]] = field(default_factory=list)
    constraint: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_sums(cls, sums: dict[str, Tensor]) -> 'UtilizationReport':
        """The report over everything that was summed.

        Args:
            sums: float64: ``load``, ``importance`` (E,), ``dropped`` () and those of
                :func:`sums_of_decisions`; ``sources`` (D, E), if the data sets are known;
                ``batches`` () and ``constraint/<name>`` (E,), if there is one.
        """
        sources = sums.get('sources')
        if sources is not None and not sources.any():
            sources = None
        load, importance = shares(sums['load']), shares(sums['importance'])
        usage = shares(sums['levels'].sum(0))
        decision_entropy = sums['decision_entropy'] / sums['items'].clamp(min=1)
        return cls(
            num_items=int(sums['items']),
            load=load.tolist(),
            importance=importance.tolist(),
            load_cv2=float(coefficient_of_variation_squared(load)),
            usage_entropy=float(entropy(importance)),
            decision_entropy=float(decision_entropy),
            mi_input=max(0.0, float(entropy(usage) - decision_entropy)),
            mi_level=float(mutual_information(sums['levels'])),
            level_shares=shares(sums['levels']).tolist(),
            dropped=float(sums['dropped'] / sums['load'].sum().clamp(min=1)),
            inference_load=shares(sums['chosen']).tolist(),
            mi_source=None if sources is None else float(mutual_information(sources)),
            source_shares=[] if sources is None else shares(sources).tolist(),
            constraint={
                key.removeprefix(_CONSTRAINT): (value / sums['batches']).tolist()
                for key, value in sums.items()
                if key.startswith(_CONSTRAINT)
            },
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.load)

    def dead_experts(self, share: float) -> list[int]:
        """Experts whose load is below ``share`` of the fair 1 / E."""
        return [e for e, load in enumerate(self.load) if load < share / self.num_experts]

    def disagreement(self) -> float:
        """The share of the routed rows that inference would give to another expert, at least.

        0 where noise and masks change who gets what but not how much. It is the total variation
        distance between ``load`` and ``inference_load``.
        """
        pairs = zip(self.load, self.inference_load, strict=False)
        return sum(abs(a - b) for a, b in pairs) / 2

    def has_collapsed(self, share: float) -> bool:
        """Whether the decision hardly depends on the input: ``mi_input < share · log E``.

        One item, or one expert, cannot say.
        """
        return self.num_items > 1 < self.num_experts and (
            self.mi_input < share * math.log(self.num_experts)
        )

    def as_dict(self) -> dict:
        """All attributes, for JSON."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """One number per name, for visualisation backends."""
        scalars = {}
        content = self.as_dict()
        content |= content.pop('constraint')
        for key, value in content.items():
            if isinstance(value, list) and key not in ('level_shares', 'source_shares'):
                if not value:
                    continue
                if self.num_experts > FEW_EXPERTS:
                    value = {'min': min(value), 'max': max(value)}
                    scalars.update({f'{key}_{e}': v for e, v in value.items()})
                    continue
                scalars.update({f'{key}_{e}': v for e, v in enumerate(value)})
            elif isinstance(value, float):
                scalars[key] = value
        return scalars

    def __str__(self) -> str:
        load, importance = map(_listed, (self.load, self.importance))
        differs = self.disagreement() >= DISAGREEMENT
        return (
            f'load {load}{f" (at inference {_listed(self.inference_load)})" if differs else ""} '
            f'| importance {importance} | decision entropy {self.decision_entropy:.2f} '
            f'| information on input {self.mi_input:.3f}, on level {self.mi_level:.3f}'
            + ('' if self.mi_source is None else f', on data set {self.mi_source:.3f}')
            + f' nats of {self.usage_entropy:.2f}'
            + (f' | dropped {100 * self.dropped:.1f} %' if self.dropped else '')
        )


def _listed(shares: list[float]) -> str:
    if len(shares) > FEW_EXPERTS:
        return f'{min(shares):.2g} to {max(shares):.2g} of {len(shares)} experts'
    return ' '.join(f'{x:.2f}' for x in shares)


class Utilization:
    """Sums over routings, from which a :class:`UtilizationReport` is computed.

    Args:
        num_experts: E.
        num_sources: How many data sets D the images come from, where that is to be told apart.
    """

    def __init__(self, num_experts: int, num_sources: int = 0) -> None:
        self.num_experts, self.num_sources = num_experts, num_sources
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, routing: Routing, router: Router | None = None) -> None:
        """Add one forward pass. Stays on the device and waits for nothing.

        Args:
            routing: What was decided.
            router: The router that decided; asked again for its decision at inference. None: that
                is what the routing holds.
        """
        expert_ids, weights_TK = routing.expert_ids, routing.weights
        if router is not None:
            expert_ids, weights_TK = router.choose(routing.logits, training=False)
        weights_TK = shares(weights_TK)  # zeros, if so small that nobody was chosen
        weights_TE = torch.zeros_like(routing.logits).scatter(1, expert_ids, weights_TK)
        sums = {
            **sums_of_decisions(
                weights_TE.float(), routing.level_ids, len(routing.items_per_level)
            ),
            'load': routing.load(),
            'importance': routing.importance(),
            'dropped': routing.num_dropped(),
        }
        if self.num_sources > 1:
            sums['sources'] = _by_source(weights_TE.float(), routing, self.num_sources)
        if router is not None and router.training and router.constraint is not None:
            sums['batches'] = routing.logits.new_ones(())
            for name, value in router.constraint.by_expert().items():
                sums[_CONSTRAINT + name] = value
        for key, value in sums.items():
            # A copy: a constraint goes on changing its state in place.
            value = value.detach().to(torch.float64, copy=True)
            if (before := self._sums.get(key)) is not None:
                shape = tuple(map(max, before.shape, value.shape))  # of varying numbers of levels
                value = _grown(before, shape) + _grown(value, shape)
            self._sums[key] = value

    def report(self) -> UtilizationReport | None:
        """Compute the report over everything added since the construction, on all ranks.

        A collective operation under ``torch.distributed``: call it on every rank, also on one that
        has added nothing.

        Returns:
            None if nothing has been added on any rank.
        """
        sums = {key: value.clone() for key, value in self._sums.items()}
        if is_distributed():
            shapes: dict[str, tuple[int, ...]] = {}
            for of_rank in all_gather_object({key: tuple(v.shape) for key, v in sums.items()}):
                for key, shape in of_rank.items():
                    shapes[key] = max(shapes.get(key, ()), shape)
            nothing = torch.zeros((), dtype=torch.float64, device=get_comm_device())
            sums = {
                key: _grown(sums[key], shape) if key in sums else nothing.new_zeros(shape)
                for key, shape in sorted(shapes.items())
            }
        global_sum_(list(sums.values()))
        return UtilizationReport.from_sums(sums) if sums else None


def _grown(sums: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With zeros behind."""
    if sums.shape == shape:
        return sums
    grown = sums.new_zeros(shape)
    grown[tuple(map(slice, sums.shape))] = sums
    return grown


def _by_source(weights_TE: Tensor, routing: Routing, num_sources: int) -> Tensor:
    """(D, E); all 0 where a layer decides on inputs of its own, or nobody knows the data sets."""
    sums = weights_TE.new_zeros(num_sources, weights_TE.shape[1], dtype=torch.float64)
    if routing.sources is None or len(routing.sources) != routing.num_images:
        return sums
    sources = torch.tensor(routing.sources, device=sums.device)
    return sums.index_add(0, sources[routing.image_ids], weights_TE.double())


def sums_of_decisions(weights_TE: Tensor, level_ids: Tensor, num_levels: int) -> dict[str, Tensor]:
    """The sums over decisions that the informations of a report are computed from.

    Args:
        weights_TE: (T, E), rows sum to 1, 0 for experts that were not chosen.
        level_ids: int64 (T,), in 0..L-1.
        num_levels: L.

    Returns:
        ``items`` (), ``decision_entropy`` (), ``levels`` (L, E) and ``chosen`` (E,), as
        :meth:`UtilizationReport.from_sums` wants them.
    """
    levels = weights_TE.new_zeros(num_levels, weights_TE.shape[1], dtype=torch.float64)
    return {
        'items': weights_TE.new_tensor(float(len(weights_TE))),
        'decision_entropy': entropy(weights_TE).sum(),
        'levels': levels.index_add(0, level_ids, weights_TE.double()),
        'chosen': (weights_TE > 0).to(weights_TE.dtype).sum(0),
    }
