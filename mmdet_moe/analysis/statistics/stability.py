"""How many decisions two checkpoints of one model take alike, on the same images.

Decisions are the same ones if they have the same unit: the image, and the place in it. RoIs, and
the queries of a transformer, are found by the model itself, so that they have no counterpart.

Letters: n decisions, E experts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmdet_moe.analysis.recorder import ITEM_BITS
from mmdet_moe.analysis.records.contents import ClassifierRecords, DetectorRecords
from mmdet_moe.analysis.records.files import PLAN_FILE, RecordFiles

if TYPE_CHECKING:
    from mmdet_moe.analysis.study import Study

#: What two analyses have to have in common.
_COMMON = {'model': 'config', 'data': 'data set', 'split': 'split', 'format': 'version of records'}
_Decisions = tuple[np.ndarray, np.ndarray, np.ndarray]
#: What independent decisions would have in common is the mean of so many.
DRAWS = 100


class Stability:
    """Sums over the decisions that two checkpoints have taken.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self._together = np.zeros((num_experts, num_experts))  # by the expert with the most weight
        self._overlap = self._common = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Add decisions.

        Args:
            before: (n, E), the weights in one checkpoint; rows without a sum are left out.
            after: (n, E), those of the same decisions in the other one.
        """
        totals = before.sum(1) * after.sum(1)
        known = np.isfinite(totals) & (totals > 0)
        before, after = before[known].astype(np.float64), after[known].astype(np.float64)
        np.add.at(self._together, (before.argmax(1), after.argmax(1)), 1)
        chosen, other = before > 0, after > 0
        self._overlap += ((chosen & other).sum(1) / (chosen | other).sum(1)).sum()
        before = before / before.sum(1, keepdims=True)
        self._common += np.minimum(before, after / after.sum(1, keepdims=True)).sum()

    def as_dict(self) -> dict | None:
        """For JSON, shares in 0..1; None if nothing was added.

        ``changed``: of the decisions, another expert has the most weight. ``changed_by_chance``: it
        would be, if both chose as often as they do, but independently. ``changed_relabelled``: if
        the experts of one are renumbered as suits best, which is what counts for two trainings, and
        ``changed_relabelled_by_chance``: the mean of that over :data:`DRAWS` draws of as many
        decisions, independent of each other. Decisions of one image that are alike leave more room
        to luck than that.
        ``overlap``: mean of the chosen experts that both have in common, divided by those that any
        of them has. ``weight_in_common``: mean of ``sum_e min(w_e, w'_e)``.
        """
        total = self._together.sum()
        if total == 0:
            return None
        together = self._together / total
        apart = np.outer(together.sum(1), together.sum(0))
        draws = np.random.default_rng(0).multinomial(int(total), apart.ravel(), DRAWS)
        by_chance = [_renumbered(draw.reshape(apart.shape) / total) for draw in draws]
        return {
            'num_decisions': int(total),
            'changed': float(1 - np.trace(together)),
            'changed_by_chance': float(1 - np.trace(apart)),
            'changed_relabelled': _renumbered(together),
            'changed_relabelled_by_chance': float(np.mean(by_chance)),
            'overlap': float(self._overlap / total),
            'weight_in_common': float(self._common / total),
        }


def _renumbered(together: np.ndarray) -> float:
    return float(1 - together[linear_sum_assignment(together, maximize=True)].sum())


def stability_to(study: 'Study', folder: Path, run: str | None = None) -> dict:
    """An entry of ``stability`` of ``experts.json``.

    Args:
        study: After its statistics pass.
        folder: Of another analysis.
        run: What to call it; of several, as
            :func:`~mmdet_moe.analysis.report.names.run_names` does.

    Returns:
        ``run`` (by default its folder's name), ``reason`` why decisions were not compared, or None,
        and ``layers``: by layer :meth:`Stability.as_dict`, without layers that cannot be compared.
    """
    entry = {'run': run or folder.resolve().name, 'reason': None, 'layers': {}}
    records = folder / 'records' / 'statistics'
    try:
        plan = json.loads((records / PLAN_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {**entry, 'reason': 'its records are not there'}
    mine = study.plan
    for key, what in _COMMON.items():
        if plan.get(key) != mine[key]:
            return {**entry, 'reason': f'it is of another {what}'}
    numbers = {
        name: (i, plan['layers'].index(name))
        for i, name in enumerate(study.layers)
        if name in plan['layers'] and study.tracer.has_fixed_items(name)
    }
    sums = {name: Stability(study.layers[name].num_experts) for name in numbers}
    other = RecordFiles(study.records.kind, records, plan)
    chosen = plan['images'] if isinstance(plan['images'], list) else range(plan['images'])
    moved = set()
    for name, before, after in _pairs(other, study.records, numbers, chosen, study.data.chosen):
        if before is None:
            moved.add(name)
        else:
            sums[name].add(before, after)
    found = {name: total.as_dict() for name, total in sums.items() if name not in moved}
    entry['layers'] = {name: shares for name, shares in found.items() if shares is not None}
    if not entry['layers']:
        entry['reason'] = 'no layer decides for the same places of the same images'
        if moved:
            entry['reason'] += (
                ', as their batches are padded differently; take the same --max-images and batch '
                'size for both'
            )
    return entry


def _pairs(
    before: Iterable[DetectorRecords | ClassifierRecords],
    after: Iterable[DetectorRecords | ClassifierRecords],
    numbers: dict[str, tuple[int, int]],
    chosen_before: Sequence[int],
    chosen_after: Sequence[int],
) -> Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]:
    """Layer and weights of the decisions that both have; None if they lie in other places.

    Args:
        before: Files of records, which may hold other images than those of ``after``.
        after: Likewise.
        numbers: Those of each layer in both.
        chosen_before: The place in the data set of each image that ``before`` is of, ascending.
        chosen_after: Likewise.
    """
    first, second = (np.asarray(chosen, np.int64) for chosen in (chosen_before, chosen_after))
    waiting = iter(before)
    left: dict[str, list[_Decisions]] = {name: [] for name in numbers}
    last = -1  # the last image of what is waiting
    for part in after:
        end = second[part.images.index[-1]]
        while last < end and (other := next(waiting, None)) is not None:
            last = first[other.images.index[-1]]
            for name, (_, number) in numbers.items():
                made = other.layers[number].decisions
                left[name].append((_placed(made.unit, first), made.centre, made.weights))
        for name, (number, _) in numbers.items():
            if not left[name]:
                continue
            unit, centre, weights = map(np.concatenate, zip(*left[name], strict=True))
            made = part.layers[number].decisions
            mine = _placed(made.unit, second)
            _, rows, others = np.intersect1d(mine, unit, return_indices=True)
            # Decisions are numbered by row in maps whose width depends on the images in a batch.
            if np.allclose(made.centre[rows], centre[others], atol=0.01, equal_nan=True):
                yield name, weights[others], made.weights[rows]
            else:
                yield name, None, None
            rest = unit > mine.max(initial=-1)
            left[name] = [(unit[rest], centre[rest], weights[rest])]


def _placed(unit: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Numbers of decisions as of an analysis of the whole data set."""
    image, item = np.divmod(unit, 1 << ITEM_BITS)
    return (chosen[image] << ITEM_BITS) | item
