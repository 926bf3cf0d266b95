"""How the choices of one layer of experts go with those of the next one.

A unit goes from its main expert in one layer to its main expert in the next one; the layers are
taken in the order in which the model runs them. Where two layers decide for the same items (the
same places of the same maps), the unit is the decision; elsewhere it is the image, whose main
expert is the one with the most weight, summed over its decisions. That two choices go together does
not mean that one causes the other: both may follow the pyramid level, say.
"""

import numpy as np
import torch

from mmdet_moe.analysis.records.contents import DecisionRecords, concatenated
from mmdet_moe.analysis.study import Study
from mmdet_moe.moe.metrics import mutual_information

#: Layers of more experts are left out: nobody can follow so many bands.
MAX_EXPERTS = 64
#: Of whole images, for the information that two layers have in common by chance.
PERMUTATIONS = 199


def flow(study: Study) -> dict | None:
    """``flow`` of ``experts.json``; None with fewer than two layers to follow."""
    names = [n for n in study.order if 1 < study.layers[n].num_experts <= MAX_EXPERTS]
    if len(names) < 2:
        return None
    numbers = {name: number for number, name in enumerate(study.layers)}
    made = {
        name: concatenated([part.layers[numbers[name]].decisions for part in study.records])
        for name in names
    }
    pairs = zip(names[:-1], names[1:], strict=True)
    return {
        'layers': names,
        'steps': [{'from': a, 'to': b, **step(made[a], made[b])} for a, b in pairs],
    }


def step(first: DecisionRecords, second: DecisionRecords) -> dict:
    """From one layer to the next one.

    Args:
        first: All decisions of the layer, in the order of the images.
        second: Those of the other one.

    Returns:
        ``unit`` (``'decision'`` or ``'image'``), ``num_units``, ``counts`` (E, E'), and ``mi``, the
        mutual information of the two main experts in nats. ``chance`` is its mean, ``p_value`` the
        share of it that is as large, with whole images permuted: what all images have in common,
        such as what their levels do to both layers, stays. Both are None where images have
        different numbers of decisions.
    """
    unit = 'decision'
    if _correspond(first, second):
        image, mains = first.image, [_main(first.weights), _main(second.weights)]
    else:
        unit = 'image'
        sums = [_of_images(first), _of_images(second)]
        image = np.intersect1d(sums[0][0], sums[1][0])
        mains = [_main(total[np.isin(images, image)]) for images, total in sums]
    experts = (first.weights.shape[1], second.weights.shape[1])
    counts = _joint(*mains, experts)
    observed = float(mutual_information(torch.from_numpy(counts)))
    each = np.unique(image, return_counts=True)[1]
    chance = p_value = None
    if len(each) and (each == each[0]).all():
        rng = np.random.default_rng(0)
        blocks = mains[1].reshape(len(each), -1)
        permuted = [
            float(
                mutual_information(
                    torch.from_numpy(_joint(mains[0], rng.permutation(blocks).ravel(), experts))
                )
            )
            for _ in range(PERMUTATIONS)
        ]
        chance = float(np.mean(permuted))
        p_value = (1 + sum(mi >= observed - 1e-9 for mi in permuted)) / (1 + PERMUTATIONS)
    return {
        'unit': unit,
        'num_units': len(image),
        'counts': counts.astype(int).tolist(),
        'mi': observed,
        'chance': chance,
        'p_value': p_value,
    }


def _correspond(first: DecisionRecords, second: DecisionRecords) -> bool:
    return len(first.unit) == len(second.unit) and all(
        np.array_equal(getattr(first, column), getattr(second, column), equal_nan=True)
        for column in ('unit', 'level', 'centre')
    )


def _of_images(made: DecisionRecords) -> tuple[np.ndarray, np.ndarray]:
    """The images with decisions, ascending, and the sums of their weights, (i, E)."""
    images, which = np.unique(made.image, return_inverse=True)
    total = np.zeros((len(images), made.weights.shape[1]))
    np.add.at(total, which, made.weights)
    return images, total


def _main(weights: np.ndarray) -> np.ndarray:
    return weights.argmax(1)


def _joint(first: np.ndarray, second: np.ndarray, experts: tuple[int, int]) -> np.ndarray:
    """float64 (E, E'): how often two main experts come together."""
    pairs = np.bincount(first * experts[1] + second, minlength=experts[0] * experts[1])
    return pairs.reshape(experts).astype(np.float64)
