"""Whether the choice of experts is associated with something, and how strongly.

Objects of one image that share a decision share its weights, so they are not independent: ten
objects on one decision say no more on the router than one does. The unit of everything here is
therefore the *decision*. With

- ``C`` (U, B), how much of each bin hangs on each decision (an object whose anchors lie on two
  decisions adds 0.5 to both), and
- ``W`` (U, E), the weights of the decisions, each row divided by its sum,

the joint table is ``C^T W`` (B, E) and its mutual information is the plug-in estimate, which is
above 0 by chance alone. How far is told by a permutation test: the rows of W are permuted over the
decisions, so every decision keeps its objects.

The test takes the decisions for exchangeable. Those of one image are so only as far as the image
itself does not sway them, and those of its neighbouring patches, pixels or RoIs are not at all:
there, p-values are too small, and the mutual information is what to look at.

Letters: U decisions, B bins, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse

from mmdet_moe.analysis.records.contents import concatenated
from mmdet_moe.analysis.statistics.bins import Bins
from mmdet_moe.moe.metrics import entropy, mutual_information, shares

#: Decisions that one association remembers, at most; and weights of all of them together.
MAX_UNITS, MAX_WEIGHTS = 200_000, 1 << 24
# Equal up to the order of summation; far below any information that matters.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class AssociationResult:
    """How strongly experts and bins hang together. Informations are in nats."""

    mi: float  #: Mutual information between bin and expert, over the units of the test
    chance: float  #: Mean of it over the permutations: what would be seen without any association
    p_value: float  #: ``(1 + n) / (1 + permutations)``, where n permutations have at least ``mi``
    permutations: int  #: How many were tried
    num_units: int  #: Decisions that were permuted
    #: The smaller one of the entropies of the bins and of the experts, which bounds ``mi``
    mi_max: float
    #: float64 (B, E), the joint table over everything, also what the test did not use; its total is
    #: the number of things. None where bins were discovered
    counts: np.ndarray | None

    @property
    def bin_given_expert(self) -> np.ndarray:
        """(B, E), columns sum to 1: what does an expert see? Zeros for one that sees nothing."""
        return shares(torch.from_numpy(self.counts), dim=0).numpy()

    @property
    def expert_given_bin(self) -> np.ndarray:
        """(B, E), rows sum to 1: who sees this? Zeros for an empty bin."""
        return shares(torch.from_numpy(self.counts), dim=1).numpy()

    def first(self, bins: int) -> 'AssociationResult':
        """With the table of the first bins alone, where the others are empty."""
        return replace(self, counts=self.counts[:bins])

    def as_dict(self, bins: Bins | None = None) -> dict:
        """For JSON.

        Args:
            bins: What the B bins are; None where they were discovered, and then names, table and
                shares are left out.

        Raises:
            ValueError: If the number of bins is not that of the table.
        """
        numbers = {name: value for name, value in vars(self).items() if name != 'counts'}
        if bins is None:
            return {'edges': None, 'unit': None, **numbers}
        if self.counts is None or len(bins) != len(self.counts):
            table = 'no table' if self.counts is None else f'a table of {len(self.counts)} bins'
            raise ValueError(f'{len(bins)} bins are named, but there is {table}')
        return {
            'bins': list(bins.names),
            'edges': None if bins.edges is None else list(bins.edges),
            'unit': bins.unit,
            'counts': self.counts.tolist(),
            'bin_given_expert': self.bin_given_expert.tolist(),
            'expert_given_bin': self.expert_given_bin.tolist(),
            **numbers,
        }


@dataclass
class _Units:
    """Decisions with their weights and what hangs on them, entries sorted by decision."""

    keys: np.ndarray  #: float64 (U,), random; the smallest ones are the sample
    weights: np.ndarray  #: float32 (U, E), as given
    strata: np.ndarray  #: int64 (U,), permutations stay within a stratum
    lengths: np.ndarray  #: int64 (U,), entries of each decision
    bins: np.ndarray  #: int64 (n,)
    counts: np.ndarray  #: float64 (n,)

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, kept: np.ndarray) -> '_Units':
        """Those of a bool mask (U,)."""
        entries = np.repeat(kept, self.lengths)
        return _Units(
            *(x[kept] for x in (self.keys, self.weights, self.strata, self.lengths)),
            *(x[entries] for x in (self.bins, self.counts)),
        )


class Association:
    """Accumulates what hangs on which decision.

    Memory is bounded: the joint table is summed, and for the permutation test at most
    ``max_units`` decisions are remembered (for a moment a quarter more), with at most one entry per
    bin each. Beyond that the test uses a uniform random sample of the decisions. The table stays
    that of everything added, while ``mi``, ``chance``, ``p_value`` and ``mi_max`` are those of the
    sample, so that they can be compared with each other.

    Args:
        num_bins: B. None: bins are any numbers, discovered as they come; their table is not kept.
        num_experts: E.
        max_units: How many decisions are remembered; by default :data:`MAX_UNITS`, or as many as
            have :data:`MAX_WEIGHTS` weights.
        seed: Of the sample. The same decisions in the same order give the same sample, however
            they are divided into calls.
    """

    def __init__(
        self, num_bins: int | None, num_experts: int, max_units: int | None = None, seed: int = 0
    ) -> None:
        if max_units is None:
            max_units = max(1, min(MAX_UNITS, MAX_WEIGHTS // max(num_experts, 1)))
        if num_experts < 1 or max_units < 1 or (num_bins is not None and num_bins < 1):
            raise ValueError(
                f'num_bins={num_bins}, num_experts={num_experts} and max_units={max_units} must be '
                'at least 1'
            )
        self.num_bins = num_bins
        self.num_experts = num_experts
        self.max_units = max_units
        self.num_units = 0  # all that took part
        self._rng = np.random.default_rng(seed)
        self._limit = 1.0  # units with a larger key cannot be in the sample any more
        self._kept: list[_Units] = []
        self.num_kept = 0  # that are remembered now
        self._table = None if num_bins is None else np.zeros((num_bins, num_experts))

    def add(
        self,
        unit: np.ndarray,
        bin: np.ndarray,
        count: np.ndarray,
        weights: np.ndarray,
        stratum: np.ndarray | None = None,
    ) -> None:
        """Add n entries: so much of a bin hangs on a decision.

        All entries of one decision have to arrive in one call, so numbers of decisions need to be
        unique only within a call. Left out are entries with a negative bin (the thing belongs to
        none) or a count of 0, and entries without weights (all 0, or any NaN: the layer took no
        part). Decisions of which nothing is left do not take part in the test.

        Args:
            unit: int64 (n,), the number of the decision.
            bin: int64 (n,).
            count: float (n,), not negative.
            weights: float32 (n, E), not negative; the same for all entries of a decision. Rows are
                divided by their sums.
            stratum: int64 (n,), the same for all entries of a decision: permutations exchange
                decisions of the same stratum alone, so that what differs between strata does not
                count as an association. Default: all belong to one.

        Raises:
            ValueError: If shapes do not fit, a bin is B or more, a count or a weight is negative, a
                count is not finite, or a decision comes with different weights.
        """
        unit, bin = np.asarray(unit, dtype=np.int64), np.asarray(bin, dtype=np.int64)
        count = np.asarray(count, dtype=np.float64)
        weights = np.asarray(weights, dtype=np.float32)
        stratum = np.zeros_like(unit) if stratum is None else np.asarray(stratum, dtype=np.int64)
        self._check(unit, bin, count, weights, stratum)
        total = weights.sum(1, dtype=np.float64)
        known = (bin >= 0) & (count > 0) & np.isfinite(total) & (total > 0)
        if not known.all():
            unit, bin, count, weights, stratum = (
                x[known] for x in (unit, bin, count, weights, stratum)
            )
        if len(unit) == 0:
            return
        units = self._units(unit, bin, count, weights, stratum)
        if self._table is not None:
            np.add.at(self._table, bin, count[:, None] * _normalised(weights))
        self._remember(units)

    def table(self) -> np.ndarray:
        """The joint table of everything added, float64 (B, E).

        Raises:
            ValueError: If the bins are discovered (``num_bins=None``).
        """
        if self._table is None:
            raise ValueError('the table of discovered bins is not kept; give num_bins')
        return self._table.copy()

    def result(self, permutations: int = 999, seed: int = 0) -> AssociationResult:
        """Mutual information, and the permutation test.

        Without any decision the information is 0 and the p-value 1.

        Args:
            permutations: How many to try; the p-value can be as small as
                ``1 / (1 + permutations)``.
            seed: Of the permutations.
        """
        if permutations < 1:
            raise ValueError(f'permutations={permutations} must be at least 1')
        table = None if self._table is None else self.table()
        if self.num_units == 0:
            return AssociationResult(0.0, 0.0, 1.0, permutations, 0, 0.0, table)
        self._shrink()
        units = self._kept[0]
        weights = _normalised(units.weights)
        bins, columns = np.unique(units.bins, return_inverse=True)
        starts = np.concatenate([[0], np.cumsum(units.lengths)])
        counts = sparse.csr_array((units.counts, columns, starts), shape=(len(units), len(bins)))
        counts = counts.T.tocsr()
        joint = torch.from_numpy(counts @ weights)
        observed = float(mutual_information(joint))

        def permuted_counts(order: np.ndarray) -> sparse.csr_array:
            # Other columns instead of other rows of the weights, which are many more numbers.
            return sparse.csr_array(
                (counts.data, order[counts.indices], counts.indptr), shape=counts.shape
            )

        rng = np.random.default_rng(seed)
        permuted = np.array(
            [
                float(mutual_information(torch.from_numpy(permuted_counts(order) @ weights)))
                for order in _permutations(units.strata, permutations, rng)
            ]
        )
        reached = int((permuted >= observed - _ROUNDING).sum())
        return AssociationResult(
            mi=observed,
            chance=float(permuted.mean()),
            p_value=(1 + reached) / (1 + permutations),
            permutations=permutations,
            num_units=len(units),
            mi_max=max(0.0, min(float(entropy(shares(joint.sum(dim)))) for dim in (0, 1))),
            counts=table,
        )

    def _check(self, unit, bin, count, weights, stratum) -> None:
        n = len(unit)
        if any(x.shape != (n,) for x in (unit, bin, count, stratum)):
            raise ValueError(
                f'unit {unit.shape}, bin {bin.shape}, count {count.shape} and stratum '
                f'{stratum.shape} must be (n,)'
            )
        if weights.shape != (n, self.num_experts):
            raise ValueError(f'weights {weights.shape} must be ({n}, {self.num_experts})')
        if self.num_bins is not None and n and bin.max() >= self.num_bins:
            raise ValueError(f'bin {bin.max()} of {self.num_bins}')
        if not np.isfinite(count).all() or (count < 0).any():
            raise ValueError('counts must be finite and not negative')
        if (weights < 0).any():
            raise ValueError('weights must not be negative')

    def _units(self, unit, bin, count, weights, stratum) -> _Units:
        """Entries by decision, decisions in the order of their first entry, each bin once."""
        _, first, number = np.unique(unit, return_index=True, return_inverse=True)
        if not np.array_equal(weights, weights[first[number]]):
            raise ValueError('entries of one decision come with different weights')
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        number = rank[number]
        by_unit = np.lexsort((bin, number))
        number, bin, count = number[by_unit], bin[by_unit], count[by_unit]
        fresh = np.ones(len(number), dtype=bool)
        fresh[1:] = (np.diff(number) != 0) | (np.diff(bin) != 0)
        starts = np.flatnonzero(fresh)
        return _Units(
            keys=self._rng.random(len(first)),
            weights=weights[first[order]],
            strata=stratum[first[order]],
            lengths=np.bincount(number[starts], minlength=len(first)),
            bins=bin[starts],
            counts=np.add.reduceat(count, starts),
        )

    def _remember(self, units: _Units) -> None:
        self.num_units += len(units)
        if self._limit < 1:
            units = units.where(units.keys <= self._limit)
        if len(units):
            self._kept.append(units)
            self.num_kept += len(units)
        if self.num_kept > 1.25 * self.max_units:
            self._shrink()

    def _shrink(self) -> None:
        """Keep the ``max_units`` smallest keys, in the order of arrival."""
        units = concatenated(self._kept)
        if len(units) > self.max_units:
            self._limit = float(np.partition(units.keys, self.max_units - 1)[self.max_units - 1])
            units = units.where(units.keys <= self._limit)
        self._kept, self.num_kept = [units], len(units)


def _permutations(
    strata: np.ndarray, number: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """So many permutations, int64 (U,), that leave every index in its stratum."""
    places = np.argsort(strata, kind='stable')
    order = np.empty_like(places)
    for _ in range(number):
        order[places] = np.lexsort((rng.random(len(strata)), strata))
        yield order


def _normalised(weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float64)
    return weights / weights.sum(1, keepdims=True)
