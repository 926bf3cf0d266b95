"""How the choices of one layer of experts go with those of the next one.

A unit goes from its main expert in one layer to its main expert in the next one; the layers are
taken in the order in which the model runs them. Through all layers the unit is the image, whose
main expert is the one with the most weight, summed over its decisions. Successive layers that
decide for the same items (the same places of the same maps) are followed decision by decision as
well. That two choices go together does not mean that one causes the other: both may follow the
pyramid level, say.
"""

from itertools import pairwise

import numpy as np
import torch

from mmdet_moe.analysis.data import hashed
from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.study import Study
from mmdet_moe.moe.metrics import mutual_information

#: Layers of more experts are left out: nobody can follow so many bands.
MAX_EXPERTS = 64
#: Of whole images, for the information that two layers have in common by chance; and how many
#: units are remembered for it at most, of images drawn at random (for a moment one file more).
PERMUTATIONS, MAX_UNITS = 199, 200_000
UNITS = ('image', 'decision')
Mains = tuple[np.ndarray, np.ndarray, np.ndarray]


def flows(study: Study) -> list[dict]:
    """``flows`` of ``experts.json``; none with fewer than two layers to follow.

    Each has a ``unit`` (``'image'`` or ``'decision'``), ``layers``, and ``steps`` between them.
    That of the images is left out where all layers decide for the same items.
    """
    names = [n for n in study.order if 1 < study.layers[n].num_experts <= MAX_EXPERTS]
    if len(names) < 2:
        return []
    place = {name: i for i, name in enumerate(study.layers)}
    steps = {(*pair, unit): Step(unit) for pair in pairwise(names) for unit in UNITS}
    for part in study.records:
        for (first, second, _), step in steps.items():
            step.add(*(part.layers[place[name]].decisions for name in (first, second)))
    found = {
        (first, second, unit): {'from': first, 'to': second, **step.as_dict()}
        for (first, second, unit), step in steps.items()
        if step.fits
    }
    runs: list[list[dict]] = [[]]
    for pair in pairwise(names):
        if (*pair, 'decision') in found:
            runs[-1].append(found[(*pair, 'decision')])
        else:
            runs.append([])
    chosen = [('decision', run) for run in runs if run]
    if len(runs) > 1:
        chosen.insert(0, ('image', [found[(*pair, 'image')] for pair in pairwise(names)]))
    return [
        {'unit': unit, 'layers': [run[0]['from'], *(step['to'] for step in run)], 'steps': run}
        for unit, run in chosen
    ]


class Step:
    """From one layer to the next one.

    Args:
        unit: One of :data:`UNITS`.

    Attributes:
        fits: Whether there are such units; False once decisions were not for the same items.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.fits = True
        self._counts = np.zeros(())  # of all units
        self._per_image: set[int] = set()
        self._kept: list[Mains] = []
        self._stride = 1  # of the images that are kept

    def add(self, first: DecisionRecords, second: DecisionRecords) -> None:
        """What both layers decided for the same images."""
        experts = (first.weights.shape[1], second.weights.shape[1])
        self.fits = self.fits and (self.unit == 'image' or _correspond(first, second))
        if not self.fits:
            self._kept = []
            return
        if self.unit == 'image':
            image, *mains = _of_images(first, second)
        else:
            order = np.argsort(first.unit, kind='stable')  # image by image
            image, *mains = (
                first.image[order],
                *(x.weights.argmax(1)[order] for x in (first, second)),
            )
        self._counts = self._counts + _joint(*mains, experts)
        self._per_image |= set(np.unique(image, return_counts=True)[1].tolist())
        self._kept.append(_every(self._stride, (image, *mains)))
        while sum(len(image) for image, *_ in self._kept) > MAX_UNITS and self._stride < 1 << 30:
            self._stride *= 2
            self._kept = [_every(self._stride, kept) for kept in self._kept]

    def as_dict(self) -> dict:
        """``num_units``, ``counts`` (E, E'), and ``mi``, the mutual information of the two main
        experts in nats. ``chance`` is its mean, ``p_value`` the share of it that is as large, with
        whole images permuted: what all images have in common, such as what their levels do to both
        layers, stays. Both are None where images have different numbers of decisions. These three
        are of the images that are remembered.
        """
        experts = self._counts.shape
        found = {
            'num_units': int(self._counts.sum()),
            'counts': self._counts.astype(int).tolist(),
            'mi': float(mutual_information(torch.from_numpy(self._counts))),
            'chance': None,
            'p_value': None,
        }
        if len(self._per_image) == 1:
            _, a, b = (np.concatenate(columns) for columns in zip(*self._kept, strict=True))
            a, b = (x.reshape(-1, *self._per_image) for x in (a, b))
            observed, rng = _information(a, b, experts), np.random.default_rng(0)
            permuted = [_information(a, rng.permutation(b), experts) for _ in range(PERMUTATIONS)]
            reached = sum(mi >= observed - 1e-9 for mi in permuted)
            found |= {
                'mi': observed,
                'chance': float(np.mean(permuted)),
                'p_value': (1 + reached) / (1 + PERMUTATIONS),
            }
        return found


def _correspond(first: DecisionRecords, second: DecisionRecords) -> bool:
    return len(first.unit) == len(second.unit) and all(
        np.array_equal(getattr(first, column), getattr(second, column), equal_nan=True)
        for column in ('unit', 'level', 'centre')
    )


def _every(stride: int, mains: Mains) -> Mains:
    """Those of one in so many images, at random: in even steps they could be of a few classes."""
    wanted = hashed(mains[0].astype(np.uint32)) % np.uint32(stride) == 0
    return tuple(column[wanted] for column in mains)


def _of_images(first: DecisionRecords, second: DecisionRecords) -> Mains:
    """The images that both decided on, and the main expert of each in both layers."""
    image = np.intersect1d(first.image, second.image)
    mains = []
    for made in (first, second):
        total = np.zeros((len(image), made.weights.shape[1]))
        here = np.isin(made.image, image)
        np.add.at(total, np.searchsorted(image, made.image[here]), made.weights[here])
        mains.append(total.argmax(1))
    return image, *mains


def _information(first: np.ndarray, second: np.ndarray, experts: tuple[int, int]) -> float:
    return float(mutual_information(torch.from_numpy(_joint(first, second, experts))))


def _joint(first: np.ndarray, second: np.ndarray, experts: tuple[int, int]) -> np.ndarray:
    """float64 (E, E'): how often two main experts come together."""
    pairs = np.bincount((first * experts[1] + second).ravel(), minlength=experts[0] * experts[1])
    return pairs.reshape(experts).astype(np.float64)
