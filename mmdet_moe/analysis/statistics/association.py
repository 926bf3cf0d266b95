"""Do the experts that get some work have to do with what the work is?

A layer decides; things hang on its decisions: the objects whose anchors, or RoIs, were computed by
them. Two objects on one decision always see the same experts, and decisions of one image resemble
each other. The unit of everything here is therefore the *image*. With ``J_i`` (B, E), how much of
each bin in image i goes to each expert (every thing counts 1, divided by the weights of its
decision; an object whose anchors lie on two decisions adds 0.5 to both), the joint table is
``sum_i J_i`` and its mutual information is the plug-in estimate, which is above 0 by chance alone.
How far, and how sure that is, :mod:`~mmdet_moe.analysis.statistics.inference` tells.

Attributes hang together: small objects lie on fine levels, so a router that knows the level knows
something of the size. What it knows beyond that is the information *given* the level,
``I(X; expert | level) = sum_l p(l) I(X; expert | level = l)``.

Letters: U decisions, B bins, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmdet_moe.analysis.records.contents import concatenated
from mmdet_moe.analysis.statistics.bins import Bins
from mmdet_moe.analysis.statistics.inference import (
    Cells,
    Information,
    adjusted,
    information,
    nothing,
)
from mmdet_moe.moe.metrics import shares

#: Entries (a bin of an image) that one association remembers, at most; and weights of all of them
#: together.
MAX_ENTRIES, MAX_WEIGHTS = 200_000, 1 << 24
#: Tables with more cells have no p-values and intervals of single ones: nobody would look at them.
MAX_CELLS = 1 << 15


@dataclass(frozen=True, eq=False)
class AssociationResult:
    """How strongly experts and bins hang together."""

    information: Information
    given: dict[str, Information]  #: The same given another attribute, by its name
    #: float64 (B, E), the joint table over everything, also what the test did not use; its total is
    #: the number of things
    counts: np.ndarray
    cells: Cells | None  #: Of the B bins; None for more than :data:`MAX_CELLS`

    @property
    def bin_given_expert(self) -> np.ndarray:
        """(B, E), columns sum to 1: what does an expert see? Zeros for one that sees nothing."""
        return shares(torch.from_numpy(self.counts), dim=0).numpy()

    @property
    def expert_given_bin(self) -> np.ndarray:
        """(B, E), rows sum to 1: who sees this? Zeros for an empty bin."""
        return shares(torch.from_numpy(self.counts), dim=1).numpy()

    @property
    def tests(self) -> list[Information]:
        """All tests that were made, which belong to the family of the layer."""
        return [self.information, *self.given.values()]

    def first(self, bins: int) -> 'AssociationResult':
        """With the table of the first bins alone, where the others are empty."""
        cells = self.cells
        if cells is not None:
            ends = (cells.bin_given_expert, cells.expert_given_bin)
            cells = Cells(cells.p[:bins], *(e if e is None else e[:, :bins] for e in ends))
        return replace(self, counts=self.counts[:bins], cells=cells)

    def as_dict(self, bins: Bins, p_adjusted: Sequence[float] | None = None) -> dict:
        """For JSON.

        Args:
            bins: What the B bins are.
            p_adjusted: Of :attr:`tests`; by default, they are a family of their own.

        Raises:
            ValueError: If the number of bins is not that of the table.
        """
        if len(bins) != len(self.counts):
            raise ValueError(
                f'{len(bins)} bins are named, but there is a table of {len(self.counts)} bins'
            )
        own, *of_given = adjusted(self.tests) if p_adjusted is None else p_adjusted
        content = {
            'bins': list(bins.names),
            'edges': None if bins.edges is None else list(bins.edges),
            'unit': bins.unit,
            'counts': self.counts.tolist(),
            'bin_given_expert': self.bin_given_expert.tolist(),
            'expert_given_bin': self.expert_given_bin.tolist(),
        }
        if self.cells is not None:
            content |= {
                'bin_given_expert_interval': _rounded(self.cells.bin_given_expert),
                'expert_given_bin_interval': _rounded(self.cells.expert_given_bin),
                'cell_p': _rounded(self.cells.p),
            }
        given = zip(self.given.items(), of_given, strict=True)
        return {
            **content,
            **self.information.as_dict(own),
            'given': {name: found.as_dict(p) for (name, found), p in given},
        }


def as_family(found: dict[str, dict[str, tuple[Bins, AssociationResult]]]) -> dict[str, dict]:
    """Associations by source and attribute, for JSON; the tests of all are one family."""
    every = [result for attributes in found.values() for _, result in attributes.values()]
    values = iter(adjusted([test for result in every for test in result.tests]))
    return {
        source: {
            name: result.as_dict(bins, [next(values) for _ in result.tests])
            for name, (bins, result) in attributes.items()
        }
        for source, attributes in found.items()
    }


def _rounded(shares: np.ndarray | None) -> list | None:
    return None if shares is None else np.round(shares, 4).tolist()


@dataclass
class _Images:
    """Images, and what hangs on their decisions; entries sorted by image."""

    keys: np.ndarray  #: float64 (N,), random; the smallest ones are the sample
    image: np.ndarray  #: int64 (N,), number in the data set
    units: np.ndarray  #: int64 (N,), decisions with anything on them
    lengths: np.ndarray  #: int64 (N,), entries of each image
    cells: np.ndarray  #: int64 (n, G + 1), the given attributes, then the bin
    sums: np.ndarray  #: float32 (n, E), weights of the experts

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, kept: np.ndarray) -> '_Images':
        """Those of a bool mask (N,)."""
        entries = np.repeat(kept, self.lengths)
        return _Images(
            *(x[kept] for x in (self.keys, self.image, self.units, self.lengths)),
            *(x[entries] for x in (self.cells, self.sums)),
        )


class Association:
    """Accumulates what hangs on which decision.

    Memory is bounded: the joint table is summed, and for the inference at most ``max_entries``
    entries are remembered (for a moment a quarter more, or one image), one for each bin of an image
    (and each value of what is given). Beyond that it uses a random sample of the images. The table
    stays that of everything added, while all else is of the sample, so that it can be compared.

    Args:
        num_bins: B.
        num_experts: E.
        given: Names of the attributes that the information is told without and with. One of which
            there is only one value is left out of the results.
        max_entries: How many are remembered; by default :data:`MAX_ENTRIES`, or as many as have
            :data:`MAX_WEIGHTS` weights.
        seed: Of the sample. The same images in the same order give the same sample, however they
            are divided into calls.
    """

    def __init__(
        self,
        num_bins: int,
        num_experts: int,
        given: Sequence[str] = (),
        max_entries: int | None = None,
        seed: int = 0,
    ) -> None:
        if max_entries is None:
            max_entries = max(1, min(MAX_ENTRIES, MAX_WEIGHTS // max(num_experts, 1)))
        if num_experts < 1 or max_entries < 1 or num_bins < 1:
            raise ValueError(
                f'num_bins={num_bins}, num_experts={num_experts} and max_entries={max_entries} '
                'must be at least 1'
            )
        self.num_bins = num_bins
        self.num_experts = num_experts
        self.given = tuple(given)
        self.max_entries = max_entries
        self.num_units = 0  # all that took part
        self._rng = np.random.default_rng(seed)
        self._limit = 1.0  # images with this key, or a larger one, are not in the sample any more
        self._kept: list[_Images] = []
        self.num_kept = 0  # entries that are remembered now
        self._next_image = 0
        self._table = np.zeros((num_bins, num_experts))

    def add(
        self,
        unit: np.ndarray,
        bin: np.ndarray,
        count: np.ndarray,
        weights: np.ndarray,
        image: np.ndarray | None = None,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add n entries: so much of a bin hangs on a decision.

        All entries of one image have to arrive in one call, so numbers of decisions need to be
        unique only within a call. Left out are entries with a negative bin (the thing belongs to
        none) or a count of 0, and entries without weights (all 0, or any NaN: the layer took no
        part). Decisions, and images, of which nothing is left do not take part.

        Args:
            unit: int64 (n,), the number of the decision.
            bin: int64 (n,).
            count: float (n,), not negative.
            weights: float32 (n, E), not negative; the same for all entries of a decision. Rows are
                divided by their sums.
            image: int64 (n,), at least 0, the index of the decision's image among those analysed.
                Default: every decision is an image of its own.
            given: int64 (n,) by the names of what is given, which are all needed; any numbers.

        Raises:
            ValueError: If shapes do not fit, a bin is B or more, a count or a weight is negative, a
                count is not finite, or a decision comes with different weights or images.
        """
        unit, bin = np.asarray(unit, dtype=np.int64), np.asarray(bin, dtype=np.int64)
        count = np.asarray(count, dtype=np.float64)
        weights = np.asarray(weights, dtype=np.float32)
        cells = np.stack([*(np.asarray((given or {})[name]) for name in self.given), bin], axis=1)
        if image is None:
            decisions, image = np.unique(unit, return_inverse=True)
            image = image + self._next_image
            self._next_image += len(decisions)
        image = np.asarray(image, dtype=np.int64)
        self._check(unit, bin, count, weights, image)
        total = weights.sum(1, dtype=np.float64)
        known = (bin >= 0) & (count > 0) & np.isfinite(total) & (total > 0)
        if not known.any():
            return
        unit, cells, count, weights, image = (
            x[known] for x in (unit, cells.astype(np.int64), count, weights, image)
        )
        sums = count[:, None] * (weights / total[known, None])
        images = self._images(unit, cells, sums, weights, image)
        np.add.at(self._table, cells[:, -1], sums)
        self._remember(images)

    def table(self) -> np.ndarray:
        """The joint table of everything added, float64 (B, E)."""
        return self._table.copy()

    def result(self, permutations: int = 999, seed: int = 0) -> AssociationResult:
        """Informations, their tests and intervals.

        Without any decision the information is 0 and the p-value 1.

        Args:
            permutations: How many flips and resamples to try; the p-value can be as small as
                ``1 / (1 + permutations)``.
            seed: Of both. Tests that are to be one family need the same.
        """
        if permutations < 1:
            raise ValueError(f'permutations={permutations} must be at least 1')
        wants_cells = self._table.size <= MAX_CELLS
        if not self._kept:
            empty, table = nothing(permutations), self.table()
            cells = Cells(np.ones_like(table), None, None)
            return AssociationResult(empty, {}, table, cells if wants_cells else None)
        self._shrink()
        kept = self._kept[0]
        images = np.repeat(kept.image, kept.lengths)
        bins = kept.cells[:, -1]

        def informed(strata: np.ndarray, cells: bool) -> tuple[Information, Cells | None]:
            # A bin of an image once in each stratum: its other entries are of other strata.
            order, starts = _merged(strata, bins, images)
            first = order[starts]
            sums = np.add.reduceat(kept.sums[order], starts, dtype=np.float64)
            return information(
                images[first], bins[first], strata[first], sums, int(kept.units.sum()),
                permutations, seed, cells,
            )  # fmt: skip

        found, cells = informed(np.zeros_like(bins), wants_cells)
        if cells is not None:
            cells = self._with_empty_bins(cells, np.unique(bins))
        given = {
            name: informed(kept.cells[:, i], False)[0]
            for i, name in enumerate(self.given)
            if np.ptp(kept.cells[:, i])
        }
        return AssociationResult(found, given, self.table(), cells)

    def _with_empty_bins(self, cells: Cells, known: np.ndarray) -> Cells:
        shape = (self.num_bins, self.num_experts)
        p, of_bins, of_experts = np.ones(shape), *np.zeros((2, 2, *shape))
        p[known] = cells.p
        if cells.bin_given_expert is None:
            return Cells(p, None, None)
        of_bins[:, known], of_experts[:, known] = cells.bin_given_expert, cells.expert_given_bin
        return Cells(p, of_bins, of_experts)

    def _check(self, unit, bin, count, weights, image) -> None:
        n = len(unit)
        if any(x.shape != (n,) for x in (unit, bin, count, image)):
            raise ValueError(
                f'unit {unit.shape}, bin {bin.shape}, count {count.shape} and image '
                f'{image.shape} must be (n,)'
            )
        if weights.shape != (n, self.num_experts):
            raise ValueError(f'weights {weights.shape} must be ({n}, {self.num_experts})')
        if n and bin.max() >= self.num_bins:
            raise ValueError(f'bin {bin.max()} of {self.num_bins}')
        if not np.isfinite(count).all() or (count < 0).any():
            raise ValueError('counts must be finite and not negative')
        if (weights < 0).any():
            raise ValueError('weights must not be negative')

    def _images(self, unit, cells, sums, weights, image) -> _Images:
        """Entries by image, images in the order of their first entry, each cell once."""
        _, first, number = np.unique(unit, return_index=True, return_inverse=True)
        same = np.array_equal(weights, weights[first[number]])
        if not same or not np.array_equal(image, image[first[number]]):
            raise ValueError('entries of one decision come with different weights or images')
        known, start, place = np.unique(image, return_index=True, return_inverse=True)
        order = np.argsort(start)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        place = rank[place]
        by_cell, starts = _merged(place, *cells.T)
        return _Images(
            keys=self._rng.random(len(known)),
            image=known[order],
            units=np.bincount(place[first], minlength=len(known)),
            lengths=np.bincount(place[by_cell][starts], minlength=len(known)),
            cells=cells[by_cell][starts],
            sums=np.add.reduceat(sums[by_cell], starts).astype(np.float32),
        )

    def _remember(self, images: _Images) -> None:
        self.num_units += int(images.units.sum())
        if self._limit < 1:
            images = images.where(images.keys < self._limit)
        if len(images):
            self._kept.append(images)
            self.num_kept += len(images.cells)
        if self.num_kept > 1.25 * self.max_entries:
            self._shrink()

    def _shrink(self) -> None:
        """Keep the images of the smallest keys, as many as have room, in the order of arrival."""
        images = concatenated(self._kept)
        if len(images.cells) > self.max_entries and len(images) > 1:
            order = np.argsort(images.keys)
            room = np.cumsum(images.lengths[order]) <= self.max_entries
            # The first one that has none, and all behind it, go; one at least stays.
            self._limit = float(images.keys[order[max(1, room.argmin())]])
            images = images.where(images.keys < self._limit)
        self._kept, self.num_kept = [images], len(images.cells)


def _merged(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by the columns, the first one first: their order, and where new ones begin."""
    order = np.lexsort(columns[::-1])
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = np.any([np.diff(column[order]) != 0 for column in columns], axis=0)
    return order, np.flatnonzero(fresh)
