"""What a model did with every object: one row per detection, and one per object that it missed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmdet_moe.analysis.records.contents import (
    ClassifierRecords,
    DetectorRecords,
    LayerRecords,
    concatenated,
    select,
)
from mmdet_moe.analysis.statistics.bins import box_sizes
from mmdet_moe.analysis.statistics.matching import IGNORED

#: Values of :attr:`Outcomes.kind`.
CORRECT, WRONG, MISSED = 0, 1, 2


@dataclass
class Outcomes:
    """Columns of n rows. A classifier's rows are its images, without level and size."""

    image: np.ndarray  #: int32 (n,), index of the image in the data set
    box: np.ndarray  #: float32 (n, 4), ``(x1, y1, x2, y2)`` in px of the original image
    label: np.ndarray  #: int32 (n,), the predicted class; of a missed object the true one
    #: int32 (n,), the class of the object behind the row, -1 where there is none
    true_label: np.ndarray
    score: np.ndarray  #: float32 (n,), in 0..1; NaN for a missed object
    #: uint8 (n,), :data:`CORRECT` (matches an object of its class at an IoU of 0.5, each object
    #: once), :data:`WRONG` (does not) or :data:`MISSED` (an object that nothing matches)
    kind: np.ndarray
    #: float32 (n,), square root of the box's area in px; NaN for a classifier's image
    size: np.ndarray
    level: np.ndarray  #: int32 (n,), pyramid level; -1 where unknown
    #: float32 (n, E) by layer, of the decision behind the row (of a missed object: the mean
    #: over the anchors assigned to it). NaN where the layer took no part
    weights: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.image)


def outcomes_of(
    records: Iterable[DetectorRecords | ClassifierRecords], layers: Sequence[str], score_thr: float
) -> Outcomes:
    """What became of every object and every detection above a threshold.

    Args:
        records: Of all files.
        layers: Names of the layers of experts.
        score_thr: Least score of a detection; a classifier has none.
    """
    return concatenated(
        [
            _of_classifier(part, layers)
            if isinstance(part, ClassifierRecords)
            else _of_detector(part, layers, score_thr)
            for part in records
        ]
    )


def _of_detector(records: DetectorRecords, layers: Sequence[str], score_thr: float) -> Outcomes:
    detections, objects = records.detections, records.objects
    shown = (detections.score >= score_thr) & (detections.match != IGNORED)
    found = select(detections, shown)
    correct = found.match >= 0
    is_found = np.zeros(len(objects.label), bool)
    is_found[found.match[correct]] = True
    missed = ~is_found & ~objects.crowd
    lost = select(objects, missed)
    true_label = np.full(len(correct), -1, np.int32)
    true_label[correct] = objects.label[found.match[correct]]
    boxes = np.concatenate([found.box, lost.box])
    count = len(lost.label)
    return Outcomes(
        image=np.concatenate([found.image, lost.image]),
        box=boxes,
        label=np.concatenate([found.label, lost.label]),
        true_label=np.concatenate([true_label, lost.label]),
        score=np.concatenate([found.score, np.full(count, np.nan, np.float32)]),
        kind=np.concatenate([np.where(correct, CORRECT, WRONG), np.full(count, MISSED)]).astype(
            np.uint8
        ),
        size=box_sizes(boxes).astype(np.float32),
        level=np.concatenate([found.level, lost.level]),
        weights={
            name: np.concatenate(
                [layer.detections.weights[shown], mean_weights(layer, len(missed))[missed]]
            )
            for name, layer in zip(layers, records.layers, strict=True)
        },
    )


def _of_classifier(records: ClassifierRecords, layers: Sequence[str]) -> Outcomes:
    images, classes = records.images, records.classes
    count = len(classes.label)
    height, width = images.size.T
    zeros = np.zeros(count)
    return Outcomes(
        image=images.index,
        box=np.stack([zeros, zeros, width, height], axis=1).astype(np.float32),
        label=classes.prediction,
        true_label=classes.label,
        score=classes.score,
        kind=np.where(classes.prediction == classes.label, CORRECT, WRONG).astype(np.uint8),
        size=np.full(count, np.nan, np.float32),
        level=np.full(count, -1, np.int32),
        weights={
            name: mean_weights(layer, count)
            for name, layer in zip(layers, records.layers, strict=True)
        },
    )


def mean_weights(layer: LayerRecords, count: int) -> np.ndarray:
    """float32 (count, E), of the decisions behind each object; NaN without any."""
    links = layer.links
    weights = np.full((count, links.weights.shape[1]), np.nan, np.float32)
    weights[links.owner] = 0
    np.add.at(weights, links.owner, links.share[:, None] * links.weights)
    return weights
