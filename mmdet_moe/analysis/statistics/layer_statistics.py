"""How one layer uses its experts over a whole data set, in memory that does not grow with it."""

import numpy as np
import torch

from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.statistics.association import (
    Association,
    AssociationResult,
    as_family,
)
from mmdet_moe.analysis.statistics.bins import POSITIONS, Bins, level_bins, position_bin
from mmdet_moe.moe.utilization import (
    COLLAPSE_SHARE,
    DEAD_SHARE,
    UtilizationReport,
    sums_of_decisions,
)

#: Of a layer with more experts, only those with the most weight are told of pair by pair.
MAX_PAIRED = 64
#: More pyramid levels than any detector has.
MAX_LEVELS = 32


class LayerStatistics:
    """Sums over the decisions of one layer; every decision counts 1.

    Decisions without weights (all 0, or any NaN: the layer took no part) are left out.

    Args:
        num_experts: E.
        max_entries: How much the associations remember, see
            :class:`~mmdet_moe.analysis.statistics.association.Association`.
        seed: Of their samples.
    """

    def __init__(self, num_experts: int, max_entries: int | None = None, seed: int = 0) -> None:
        self.num_experts = num_experts
        self._sums: dict[str, torch.Tensor] = {}
        self._together = np.zeros((num_experts, num_experts))
        self._level = Association(MAX_LEVELS, num_experts, (), max_entries, seed)
        self._position = Association(len(POSITIONS), num_experts, ('level',), max_entries, seed)
        # Of one bin, for the sake of the intervals.
        self._load, self._importance = (
            Association(1, num_experts, (), max_entries, seed) for _ in range(2)
        )
        self._num_levels = 0

    def add(self, decisions: DecisionRecords) -> None:
        """Add decisions, all those of their images.

        Raises:
            ValueError: If shapes do not fit, a weight is negative, a level is beyond 31, or two
                rows have the same number.
        """
        unit, weights = decisions.unit, decisions.weights
        level, image = decisions.level, decisions.image
        if len(np.unique(unit)) != len(unit):
            raise ValueError('each row is one decision, but two rows have the same number')
        ones, nothing = np.ones(len(unit)), np.zeros_like(level)
        # First, because they check their arguments.
        self._level.add(unit, level, ones, weights, image)
        position = position_bin(*decisions.centre.T)
        self._position.add(unit, position, ones, weights, image, {'level': level})
        total = weights.sum(1)
        known = np.isfinite(total) & (total > 0)
        if not known.any():
            return
        chosen = weights > 0
        self._load.add(unit, nothing, chosen.sum(1), chosen, image)
        self._importance.add(unit, nothing, np.nan_to_num(total), weights, image)
        self._num_levels = max(self._num_levels, int(level[known].max()) + 1)
        weights_TE = torch.from_numpy(weights[known]).double()
        chosen = (weights_TE > 0).double()
        normalised = weights_TE / weights_TE.sum(1, keepdim=True)
        one_level = torch.zeros(len(weights_TE), dtype=torch.int64)
        sums = {
            # Levels are looked at by the association, so they are not told apart here.
            **sums_of_decisions(normalised, one_level, 1),
            'load': chosen.sum(0),
            'importance': weights_TE.sum(0),
            'dropped': torch.zeros((), dtype=torch.float64),
        }
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._together += (chosen.T @ chosen).numpy()

    def report(self) -> UtilizationReport:
        """Loads, entropies and information over everything added; ``mi_level`` is not told."""
        return UtilizationReport.from_sums(self._sums or self._nothing())

    def coactivation(self) -> np.ndarray:
        """Share of the decisions in which both are chosen, (E, E); the diagonal: chosen at all."""
        return self._together / max(self.report().num_items, 1)

    def paired(self) -> list[int]:
        """The experts that co-activation is told of: all, or those with the most weight."""
        order = np.argsort(-np.array(self.report().importance), kind='stable')
        return sorted(order[:MAX_PAIRED].tolist())

    def results(self, permutations: int) -> dict[str, tuple[Bins, AssociationResult]]:
        """With what the decisions go together, by attribute."""
        found = {}
        if self._num_levels > 1:
            result = self._level.result(permutations).first(self._num_levels)
            found['level'] = level_bins(self._num_levels), result
        if self._position.num_units:
            found['position'] = POSITIONS, self._position.result(permutations)
        return found

    def as_dict(
        self,
        permutations: int = 999,
        others: dict[str, dict[str, tuple[Bins, AssociationResult]]] | None = None,
    ) -> dict:
        """The statistics of ``experts.json``.

        Args:
            permutations: Of each test.
            others: Associations besides :meth:`results`, which are the source ``decisions``; by
                source and attribute. All tests together are one family.
        """
        found = {'decisions': self.results(permutations)}
        for source, results in (others or {}).items():
            found[source] = {**found.get(source, {}), **results}
        report, paired = self.report(), self.paired()
        return {
            'num_experts': self.num_experts,
            'num_decisions': report.num_items,
            'load': report.load,
            'importance': report.importance,
            'load_interval': _share_intervals(self._load, permutations),
            'importance_interval': _share_intervals(self._importance, permutations),
            'active_share': np.diag(self.coactivation()).tolist(),
            'load_cv2': report.load_cv2,
            'usage_entropy': report.usage_entropy,
            'decision_entropy': report.decision_entropy,
            'mi_input': report.mi_input,
            'dead_experts': report.dead_experts(DEAD_SHARE),
            'collapsed': report.has_collapsed(COLLAPSE_SHARE),
            'coactivation_experts': paired,
            'coactivation': self.coactivation()[np.ix_(paired, paired)].tolist(),
            'associations': as_family(found),
        }

    def _nothing(self) -> dict[str, torch.Tensor]:
        experts = torch.zeros(self.num_experts, dtype=torch.float64)
        sums = sums_of_decisions(experts.new_zeros(0, self.num_experts), experts.long()[:0], 1)
        return {**sums, 'load': experts, 'importance': experts, 'dropped': experts.sum()}


def _share_intervals(of_one_bin: Association, permutations: int) -> list[list[float]] | None:
    """[low, high] of the share of each expert; None of too few images."""
    ends = of_one_bin.result(permutations).cells.expert_given_bin
    return None if ends is None else ends[:, 0].T.tolist()
