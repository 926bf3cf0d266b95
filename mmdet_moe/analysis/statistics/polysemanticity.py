"""How many classes hang on one expert: class-level polysemanticity (arXiv 2402.12550).

An expert's contribution is zeroed, and each class's accuracy (AP of a detector) measured again. The
drops, those below 0 counted as 0, are divided by the largest one; the polysemanticity of the expert
is the L2 distance of that vector to the one-hot vector of the class hit most. 0: one class alone
hangs on the expert; the square root of C − 1: all C classes alike. An expert whose zeroing lowers
no class has none.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

#: Of the drop that is named as the largest one, corrected for all drops of the layer.
SIGNIFICANT = 0.05


def class_drops(layer: str, metrics: dict, interventions: list[dict]) -> dict[int, np.ndarray]:
    """By how much each class falls with an expert zeroed.

    Args:
        layer: The name of the layer.
        metrics: Of the unchanged model, with ``per_class``; as in ``experts.json``.
        interventions: As in ``experts.json``.

    Returns:
        By expert: float64 (C,), at least 0, in the order of ``per_class``; 0 for a class without
        anything to measure by.
    """

    def per_class(of: dict) -> np.ndarray:
        return np.array(list(of['per_class'].values()), float)  # None becomes NaN

    if not metrics.get('per_class'):
        return {}
    return {
        entry['expert']: np.nan_to_num(per_class(metrics) - per_class(entry['metrics'])).clip(min=0)
        for entry in interventions
        if entry['layer'] == layer and entry['kind'] == 'zeroed'
    }


def of_drops(drops: np.ndarray) -> float | None:
    """The polysemanticity of one expert; None if no class falls.

    Args:
        drops: By how much each class falls without it, (C,); what is below 0 counts as 0.
    """
    drops = drops.clip(min=0)
    hit = int(drops.argmax())
    return float(np.linalg.norm(np.delete(drops, hit) / drops[hit])) if drops[hit] > 0 else None


def polysemanticity(layer: str, metrics: dict, interventions: list[dict]) -> dict | None:
    """The layer's entry of ``experts.json``; None if no expert was zeroed.

    Args:
        layer, metrics, interventions: As of :func:`class_drops`.

    Returns:
        ``num_zeroed``, ``num_mattering``: how many were zeroed, and lower some class; ``mean``:
        over the latter; and for each that was zeroed: ``experts``, ``values`` (null where it
        lowers no class), ``classes`` (the name of the one hit most, or null), ``drops`` (of that
        class, in 0..1); ``largest``: ``expert``, ``class``, ``drop``, ``p_adjusted`` of the largest
        drop that is beyond chance, or None, as always of a detector.
    """
    drops = class_drops(layer, metrics, interventions)
    if not drops:
        return None
    names = list(metrics['per_class'])
    values, classes = [], []
    for drop in drops.values():
        values.append(of_drops(drop))
        classes.append(None if values[-1] is None else names[int(drop.argmax())])
    known = [value for value in values if value is not None]
    return {
        'num_zeroed': len(drops),
        'num_mattering': len(known),
        'mean': float(np.mean(known)) if known else None,
        'experts': list(drops),
        'values': values,
        'classes': classes,
        'drops': [float(drop.max()) for drop in drops.values()],
        'largest': _largest(layer, drops, names, interventions),
    }


def _largest(
    layer: str, drops: dict[int, np.ndarray], names: Sequence[str], interventions: list[dict]
) -> dict | None:
    """The largest drop of all experts and classes that chance does not explain.

    The largest ones of many are of small classes, and of chance: the same experts turn as many
    images right as wrong. A sign test (McNemar's, exact and one-sided) of those of the class that
    change, times the number of drops there are (Bonferroni).
    """
    number, found = len(drops) * len(names), []
    for entry in interventions:
        if entry['layer'] != layer or entry['kind'] != 'zeroed':
            continue
        for name, (gained, lost) in (entry.get('changed_per_class') or {}).items():
            p = min(1.0, number * float(binom.sf(lost - 1, gained + lost, 0.5)))
            if p < SIGNIFICANT:
                drop = float(drops[entry['expert']][names.index(name)])
                found.append(
                    {'expert': entry['expert'], 'class': name, 'drop': drop, 'p_adjusted': p}
                )
    return max(found, key=lambda one: one['drop'], default=None)
