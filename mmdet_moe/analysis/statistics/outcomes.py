"""What a model did with every object: one row for each object, and one for each detection."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmdet_moe.analysis.records.contents import (
    ClassifierRecords,
    DetectionRecords,
    DetectorRecords,
    LayerRecords,
    ObjectRecords,
    concatenated,
    select,
)
from mmdet_moe.analysis.statistics.bins import box_sizes
from mmdet_moe.analysis.statistics.matching import (
    CLASSIFICATION,
    CORRECT,
    IGNORED,
    Reasons,
    reasons,
)

#: Probabilities below it count as it in the logarithm of a classifier's loss.
_LEAST = 1e-7


@dataclass
class Outcomes:
    """Columns of n rows, by image, the objects of an image before its detections.

    Two populations, which are never counted together: *objects*, the ground truth (a classifier's
    images are its objects, without level and size), and *detections*. An object counts as its true
    class, a detection as the predicted one (:attr:`counted_label`).
    """

    image: np.ndarray  #: int32 (n,), index of the image among those analysed, ascending
    is_detection: np.ndarray  #: bool (n,)
    box: np.ndarray  #: float32 (n, 4), ``(x1, y1, x2, y2)`` in px of the original image
    #: int32 (n,), the predicted class; of an object that of its partner, -1 without one
    label: np.ndarray
    #: int32 (n,), the true class; of a detection that of its partner, -1 without one
    true_label: np.ndarray
    score: np.ndarray  #: float32 (n,), in 0..1; of an object its partner's, NaN without one
    #: uint8 (n,), of :data:`~mmdet_moe.analysis.statistics.matching.KINDS`; a classifier's images
    #: are CORRECT or CLASSIFICATION
    kind: np.ndarray
    #: int32 (n,), rows from this one to its partner: the object that a detection matches or, by its
    #: error, means, and the detection that finds the object, or would but for one error; 0: none
    partner: np.ndarray
    iou: np.ndarray  #: float32 (n,), intersection over union with the partner; NaN without one
    #: float32 (n,). An object: 1 - score x IoU of the detection that finds it, 1 where none does. A
    #: detection: 1 - score x IoU if it is correct, else its score. In 0..1. A classifier's image:
    #: cross-entropy, -log of the probability of the true class
    loss: np.ndarray
    #: float32 (n,), square root of the box's area in px; NaN for a classifier's image
    size: np.ndarray
    level: np.ndarray  #: int32 (n,), pyramid level; -1 where unknown
    #: float32 (n, E) by layer, of the decision behind a detection, and the mean over the decisions
    #: behind the anchors assigned to an object. NaN where the layer took no part
    weights: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.image)

    @property
    def counted_label(self) -> np.ndarray:
        """int32 (n,), the class that a row counts as in its population."""
        return np.where(self.is_detection, self.label, self.true_label)


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
    shown = (records.detections.score >= score_thr) & (records.detections.match != IGNORED)
    found, objects = select(records.detections, shown), records.objects
    why = _reasons(found, objects)
    counts = ~objects.crowd
    # Rows before they are sorted: the objects that count, then the detections.
    number, first = np.cumsum(counts) - 1, int(counts.sum())
    image = np.concatenate([objects.image[counts], found.image])
    order = np.argsort(image, kind='stable')
    place = np.argsort(order)

    def joined(of_objects: np.ndarray, of_detections: np.ndarray, dtype: type) -> np.ndarray:
        return np.concatenate([of_objects[counts], of_detections]).astype(dtype)[order]

    found_by = np.where(why.object_partner < 0, -1, first + why.object_partner)
    partner = np.concatenate([found_by[counts], _taken(number, why.partner, -1)])
    boxes = joined(objects.box, found.box, np.float32)
    score = _taken(found.score, why.object_partner, np.nan)
    overlap = _taken(why.overlap, why.object_partner, np.nan)
    return Outcomes(
        image=image[order].astype(np.int32),
        is_detection=(np.arange(len(image)) >= first)[order],
        box=boxes,
        label=joined(_taken(found.label, why.object_partner, -1), found.label, np.int32),
        true_label=joined(objects.label, _taken(objects.label, why.partner, -1), np.int32),
        score=joined(score, found.score, np.float32),
        kind=joined(why.object_kind, why.kind, np.uint8),
        partner=np.where(partner < 0, 0, place[partner] - place)[order].astype(np.int32),
        iou=joined(overlap, why.overlap, np.float32),
        loss=joined(
            np.where(why.object_kind == CORRECT, 1 - score * overlap, 1),
            np.where(why.kind == CORRECT, 1 - found.score * why.overlap, found.score),
            np.float32,
        ),
        size=box_sizes(boxes).astype(np.float32),
        level=joined(objects.level, found.level, np.int32),
        weights={
            name: joined(
                mean_weights(layer, len(counts)), layer.detections.weights[shown], np.float32
            )
            for name, layer in zip(layers, records.layers, strict=True)
        },
    )


def _reasons(found: DetectionRecords, objects: ObjectRecords) -> Reasons:
    """Those of all images; partners are rows of the records."""
    parts, one_empty = [], np.zeros(0, np.int64)
    for image in np.union1d(found.image, objects.image):
        mine, theirs = np.flatnonzero(found.image == image), np.flatnonzero(objects.image == image)
        detections, truth = select(found, mine), select(objects, theirs)
        offset = theirs[0] if len(theirs) else 0
        part = reasons(
            detections.box, detections.score, detections.label,
            np.where(detections.match < 0, -1, detections.match - offset),
            truth.box, truth.label, truth.crowd,
        )  # fmt: skip
        parts.append(
            part._replace(
                partner=_taken(theirs, part.partner, -1),
                object_partner=_taken(mine, part.object_partner, -1),
            )
        )
    parts = parts or [Reasons(one_empty, one_empty, one_empty, one_empty, one_empty)]
    return Reasons(*map(np.concatenate, zip(*parts, strict=True)))


def _taken(values: np.ndarray, index: np.ndarray, default: float) -> np.ndarray:
    """``values[index]``, and ``default`` where the index is negative."""
    return np.append(values, np.array([default], np.result_type(values, type(default))))[
        np.maximum(index, -1)
    ]


def _of_classifier(records: ClassifierRecords, layers: Sequence[str]) -> Outcomes:
    images, classes = records.images, records.classes
    count = len(classes.label)
    height, width = images.size.T
    zeros = np.zeros(count)
    return Outcomes(
        image=images.index,
        is_detection=np.zeros(count, bool),
        box=np.stack([zeros, zeros, width, height], axis=1).astype(np.float32),
        label=classes.prediction,
        true_label=classes.label,
        score=classes.score,
        kind=np.where(classes.prediction == classes.label, CORRECT, CLASSIFICATION).astype(
            np.uint8
        ),
        partner=np.zeros(count, np.int32),
        iou=np.full(count, np.nan, np.float32),
        loss=-np.log(np.maximum(classes.true_score, _LEAST)),
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
