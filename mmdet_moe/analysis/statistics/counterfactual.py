"""What each expert alone would have made of every object, and whether the router chose the best.

The interventions ``'only'`` send every item of a layer to one expert, so they have predicted every
image as each expert alone would. With ``s_e(o)`` the score of object ``o`` under expert ``e`` alone
(the highest score of a detection of its class that overlaps it at an IoU of 0.5 or more, 0 without
one; of a classifier's image 1 if its class is predicted, else 0) and ``c(o)`` the expert with the
most weight behind ``o``, the choice's *regret* is ``max_e s_e(o) - s_c(o)``, at least 0.

An object's choice is one of all the decisions that ``'only'`` changes: the other levels, patches or
RoIs of its image go to the expert as well. Intervals are percentiles of a bootstrap over images,
which keeps the objects of an image together.

Letters: n objects, E experts, I images, C classes, Q quantities, B samples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ChangedClassRecords,
    LayerRecords,
    concatenated,
    select,
)
from mmdet_moe.analysis.statistics.bins import COCO_SIZES, box_sizes, coco_size_bin
from mmdet_moe.analysis.statistics.inference import (
    MIN_IMAGES,
    QUANTILES,
    TOO_FEW,
    resampled_images,
    weighted,
)
from mmdet_moe.analysis.statistics.matching import IGNORED, match
from mmdet_moe.analysis.statistics.outcomes import mean_weights
from mmdet_moe.analysis.study import Study

#: Rows and columns of a detector's confusions besides the classes: nothing is there, or is found.
BACKGROUND, MISSED = 'background', 'missed'
#: More cells than this, of all experts together, are no picture any more: no confusions are told.
MAX_CELLS = 250_000
#: Of the bootstrap.
SAMPLES = 999
_MIN_IOU = 0.5
# Scores of equal predictions differ by rounding.
_EQUAL = 1e-6


@dataclass
class Alone:
    """The n objects of a data set, as one layer's experts alone see them."""

    image: np.ndarray  #: int (n,), index in the data set
    label: np.ndarray  #: int (n,), the true class
    size: np.ndarray  #: float (n,), √area in px; NaN of a classifier's image
    chosen: np.ndarray  #: int (n,), the expert with the most weight behind it; -1 if unknown
    own: np.ndarray  #: float (n,), score under the model as it is
    scores: np.ndarray  #: float (n, E), under each expert alone


def counterfactuals(study: Study) -> dict[str, dict | None]:
    """``counterfactual`` of each layer, as in ``experts.json``.

    None of a layer without the interventions ``'only'``: one with a single expert or with very many
    of them, or any where not all images have been through them.
    """
    names = list(study.layers)
    if not study.interventions or study.changed.num_images != len(study.data):
        return dict.fromkeys(names)
    only = {name: _only(study, name) for name in names}
    changed = _of_detector if study.is_detector else _of_classifier
    found = changed(study, {name: numbers for name, numbers in only.items() if numbers})
    classes = study.data.classes
    return {
        name: summary(*found[name], classes, study.score_thr if study.is_detector else None)
        if name in found
        else None
        for name in names
    }


def _only(study: Study, layer: str) -> list[int]:
    """Numbers of the interventions with one expert alone, in the order of the experts."""
    return [
        number
        for number, made in enumerate(study.interventions)
        if made.layer == layer and made.kind == 'only'
    ]


def _chosen(layer: LayerRecords, count: int) -> np.ndarray:
    """The expert with the most weight behind each of so many objects; -1 where nobody is."""
    weights = mean_weights(layer, count)
    return np.where(np.isnan(weights).any(1), -1, np.nan_to_num(weights).argmax(1))


# Detectors ---------------------------------------------------------------------------------------


def _of_detector(study: Study, only: dict[str, list[int]]) -> dict[str, tuple]:
    place = {name: i for i, name in enumerate(study.layers)}
    parts, own, chosen = [], [], {name: [] for name in only}
    for part in study.records:  # no more of them is kept in memory than that
        parts.append(part.objects)
        own.append(object_scores(part.detections, part.objects))
        for name, of_layer in chosen.items():
            of_layer.append(_chosen(part.layers[place[name]], len(part.objects.label)))
    objects = concatenated(parts)
    wanted = ~objects.crowd
    real = select(objects, wanted)
    scores = {name: np.zeros((len(real.label), len(made))) for name, made in only.items()}
    classes = len(study.data.classes)
    tables = {
        name: np.zeros((len(made), classes + 1, classes + 1), np.int64)
        for name, made in only.items()
        if len(made) * (classes + 1) ** 2 <= MAX_CELLS
    }
    for part in study.changed:
        for name, made in only.items():
            for expert, number in enumerate(made):
                found = part[number]
                here = np.isin(real.image, np.unique(found.image))
                scores[name][here, expert] = object_scores(found, select(real, here))
                if name in tables:
                    shown = select(found, found.score >= study.score_thr)
                    here = np.isin(objects.image, np.unique(shown.image))
                    tables[name][expert] += confusions(shown, select(objects, here), classes)
    for name, table in tables.items():
        # What is left of the objects: images without any detection above the threshold, too.
        for expert in range(len(only[name])):
            every = np.bincount(real.label, minlength=classes)
            table[expert, :classes, classes] = every - table[expert, :classes, :classes].sum(1)
    return {
        name: (
            Alone(
                real.image, real.label, box_sizes(real.box),
                np.concatenate(chosen[name])[wanted], np.concatenate(own)[wanted], scores[name],
            ),
            tables.get(name),
        )
        for name in only
    }  # fmt: skip


def object_scores(found: BoxRecords, objects: BoxRecords) -> np.ndarray:
    """Highest score of a detection of each object's class with an IoU of at least 0.5.

    Args:
        found: d detections.
        objects: n objects; their images, boxes and labels count.

    Returns:
        float64 (n,), 0 where there is none.
    """
    scores = np.zeros(len(objects.label))
    for mine, here in _by_image(objects.image, found.image):
        overlaps = box_iou(
            torch.from_numpy(objects.box[mine]).double(), torch.from_numpy(found.box[here]).double()
        ).numpy()
        fits = (overlaps >= _MIN_IOU) & (objects.label[mine][:, None] == found.label[here])
        scores[mine] = np.where(fits, found.score[here], 0).max(1, initial=0)
    return scores


def confusions(found: BoxRecords, objects: BoxRecords, classes: int) -> np.ndarray:
    """True against predicted classes.

    Detections first take the objects of their own class, as for the metrics. Those that are left
    take, by score, the objects that are left, of whatever class, at an IoU of 0.5 or more. What is
    then left of the detections belongs to the background.

    Args:
        found: Detections above the threshold.
        objects: Of the same images; with ``crowd``, whose detections do not count.
        classes: C.

    Returns:
        int64 (C + 1, C + 1), rows: the true class, last the background; columns: the predicted
        class. The last column, of what is missed, is 0 here.
    """
    table = np.zeros((classes + 1, classes + 1), np.int64)
    for here, mine in _by_image(found.image, objects.image, everything=True):
        boxes, scores, labels = found.box[here], found.score[here], found.label[here]
        truth, crowd = objects.label[mine], objects.crowd[mine]
        matched = match(boxes, scores, labels, objects.box[mine], truth, crowd)
        free = np.ones(len(truth), bool)
        free[matched[matched >= 0]] = False
        left, taken = np.flatnonzero(matched == -1), np.flatnonzero(free & ~crowd)
        any_class = match(
            boxes[left], scores[left], np.zeros(len(left)), objects.box[mine][taken],
            np.zeros(len(taken)), crowd[taken],
        )  # fmt: skip
        matched[left] = np.where(any_class >= 0, np.append(taken, -1)[any_class], -1)
        counted = matched != IGNORED
        rows = np.where(matched >= 0, np.append(truth, classes)[matched], classes)
        np.add.at(table, (rows[counted], labels[counted]), 1)
    return table


def _by_image(
    images: np.ndarray, others: np.ndarray, everything: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, rows of the others) of each image; only of those that both have, or of all."""
    order, other_order = np.argsort(images, kind='stable'), np.argsort(others, kind='stable')
    unique = np.unique(images)
    for first, end, other_first, other_end in zip(
        *(np.searchsorted(images[order], unique, side) for side in ('left', 'right')),
        *(np.searchsorted(others[other_order], unique, side) for side in ('left', 'right')),
        strict=True,
    ):
        if everything or other_end > other_first:
            yield order[first:end], other_order[other_first:other_end]


# Classifiers -------------------------------------------------------------------------------------


def _of_classifier(study: Study, only: dict[str, list[int]]) -> dict[str, tuple]:
    place = {name: i for i, name in enumerate(study.layers)}
    images, parts, chosen = [], [], {name: [] for name in only}
    for part in study.records:
        images.append(part.images.index)
        parts.append(part.classes)
        for name, of_layer in chosen.items():
            of_layer.append(_chosen(part.layers[place[name]], len(part.classes.label)))
    image, truth = np.concatenate(images), concatenated(parts)
    changed: ChangedClassRecords = concatenated(list(study.changed))
    # A model may know more classes than images without names show.
    predicted = (of.prediction.max(initial=0) for of in (truth, changed))
    classes = max(len(study.data.classes), 1 + int(max(predicted)))
    found = {}
    for name, made in only.items():
        predicted = changed.prediction[:, made]
        table = None
        if len(made) * classes**2 <= MAX_CELLS:
            table = np.zeros((len(made), classes, classes), np.int64)
            experts = np.broadcast_to(np.arange(len(made)), predicted.shape)
            np.add.at(table, (experts, truth.label[:, None], predicted), 1)
        found[name] = (
            Alone(
                image, truth.label, np.full(len(image), np.nan),
                np.concatenate(chosen[name]), (truth.prediction == truth.label).astype(float),
                (predicted == truth.label[:, None]).astype(float),
            ),
            table,
        )  # fmt: skip
    return found


# Summary -----------------------------------------------------------------------------------------


def summary(
    alone: Alone, table: np.ndarray | None, classes: Sequence[str], score_thr: float | None
) -> dict:
    """The numbers of one layer.

    Args:
        alone: Its objects; those whose choice is unknown are left out.
        table: Its confusions, (E, C, C), or (E, C + 1, C + 1) of a detector; None for none.
        classes: Their names; further ones of the confusions are numbers.
        score_thr: Of the confusions; None of a classifier.
    """
    known = alone.chosen >= 0
    unknown = int((~known).sum())
    alone = select(alone, known)
    scores, chosen = alone.scores, alone.chosen
    count, experts = scores.shape
    rows = np.arange(count)
    best = scores.max(1, initial=0)
    own_choice = scores[rows, chosen]
    is_best = scores >= best[:, None] - _EQUAL
    single = int(scores.mean(0).argmax()) if count else 0
    regret = best - own_choice
    everything = np.ones(count, bool)
    sizes = coco_size_bin(alone.size)
    quantities = {
        'model': (alone.own, everything),
        'chosen': (own_choice, everything),
        'random': (scores.mean(1), everything),
        'best_single': (scores[:, single], everything),
        'oracle': (best, everything),
        'regret': (regret, everything),
        'over_random': (own_choice - scores.mean(1), everything),
        'over_best_single': (own_choice - scores[:, single], everything),
        'best_share': (is_best[rows, chosen], everything),
        'best_share_random': (is_best.mean(1), everything),
        **{('alone', e): (scores[:, e], everything) for e in range(experts)},
        **{('expert', e): (regret, chosen == e) for e in range(experts)},
        **{('size', b): (regret, sizes == b) for b in range(len(COCO_SIZES))},
        **{('class', c): (regret, alone.label == c) for c in range(len(classes))},
    }
    told = dict(zip(quantities, _means(list(quantities.values()), alone.image), strict=True))
    names = [*classes]
    if score_thr is None and table is not None:
        names += map(str, range(len(classes), table.shape[1]))
    return {
        'measure': 'correct' if score_thr is None else 'score',
        'num_objects': count,
        'num_unknown': unknown,
        'num_images': len(np.unique(alone.image)),
        'num_differing': int((~is_best).any(1).sum()),
        'best_single_expert': single,
        **{name: told[name] for name in quantities if isinstance(name, str)},
        'alone': [told['alone', e] for e in range(experts)],
        'regret_by_expert': [told['expert', e] for e in range(experts)],
        'regret_by_size': {
            name: told['size', b] for b, name in enumerate(COCO_SIZES.names)
        } if score_thr is not None else None,
        'regret_by_class': {name: told['class', c] for c, name in enumerate(classes)},
        'confusion': None if table is None else {
            'score_thr': score_thr,
            'true': names if score_thr is None else [*names, BACKGROUND],
            'predicted': names if score_thr is None else [*names, MISSED],
            'counts': table.tolist(),
        },
    }  # fmt: skip


def _means(quantities: Sequence[tuple[np.ndarray, np.ndarray]], image: np.ndarray) -> list[dict]:
    """``{value, interval, num}`` of the mean of each quantity over those objects of a mask.

    Args:
        quantities: Q pairs of values, float (n,), and masks, bool (n,).
        image: int (n,), which are drawn with all of their objects.
    """
    images, which = np.unique(image, return_inverse=True)
    if not len(images):
        return [{'value': None, 'interval': None, 'num': 0} for _ in quantities]
    sums = np.stack([np.bincount(which, v * m, len(images)) for v, m in quantities], 1)
    nums = np.stack([np.bincount(which, m, len(images)) for _, m in quantities], 1)
    drawn, rows = resampled_images(len(images), SAMPLES), np.arange(len(images))
    found = []
    with np.errstate(invalid='ignore'):  # NaN where no image with such an object is drawn
        sampled = weighted(drawn, rows, sums) / weighted(drawn, rows, nums)
    having = (nums > 0).sum(0)
    for total, num, of, means in zip(sums.sum(0), nums.sum(0), having, sampled.T, strict=True):
        value = float(total / num) if num else None
        is_known = of >= MIN_IMAGES
        ends = np.nanquantile(means, QUANTILES).tolist() if is_known else None
        found.append({'value': value, 'interval': ends, 'num': int(num)})
    return found


def sentences(experts: dict) -> list[str]:
    """What the verdict says on the choices; each starts with the path of the layer and a colon.

    Args:
        experts: The content of ``experts.json``.
    """
    alone = {path: layer.get('counterfactual') for path, layer in experts['layers'].items()}
    return [f'{path}: {sentence}' for path, found in alone.items() if (sentence := said(found))]


def said(counterfactual: dict | None) -> str | None:
    """A sentence for the verdict on the choices of one layer; None where nothing is known."""
    if not counterfactual or not counterfactual['num_objects']:
        return None
    found = counterfactual
    things = 'objects' if found['measure'] == 'score' else 'images'
    measure = 'score' if found['measure'] == 'score' else 'accuracy'
    low, high = found['over_random']['interval'] or (-math.inf, math.inf)
    better = 'better than' if low > 0 else 'worse than' if high < 0 else 'not told from'
    known = f'95 % {low:+.3f} to {high:+.3f}' if math.isfinite(low) else TOO_FEW
    numbers = ', '.join(
        f'{name} {found[key]["value"]:.3f}'
        for name, key in (
            ('main expert alone', 'chosen'),
            ('a random one', 'random'),
            (f'expert {found["best_single_expert"]} for all', 'best_single'),
            ('the best for each', 'oracle'),
        )
    )
    return (
        f'the choice is {better} a random one: mean {measure} of {found["num_objects"]} {things} '
        f'with the {numbers}; choice minus random {found["over_random"]["value"]:+.3f} ({known}); '
        f'it is the best one for '
        f'{100 * found["best_share"]["value"]:.0f} % of the {things} (a random one for '
        f'{100 * found["best_share_random"]["value"]:.0f} %).'
    )
