"""Metrics of what was predicted: AP by COCO's evaluation for detectors, accuracy for classifiers.

``metrics`` dicts as in ``experts.json``: one number per name, and ``per_class`` by class name; None
where there is nothing to measure by (AP of a size or class without objects).

Every metric can be asked what it would be on resamples of the images (a bootstrap). For AP, COCO's
matching of detections with objects, which each image has alone, is done once; each resample counts
the detections of an image as often as it drew the image, and accumulates the curve of precision
over recall again, to the same AP as COCOeval on a data set in which the images are repeated.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.records.contents import BoxRecords

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

_AREAS = {'AP small': 1, 'AP medium': 2, 'AP large': 3}  # indices of COCOeval's area ranges
_MAX_DETECTIONS = 100
_IOUS = 10
# Numbers of objects times resamples at once.
_BLOCK = 1 << 21


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What was measured.

    Attributes:
        metrics: As in ``experts.json``.
        resampled: Given how often each of N images is drawn, int (N, P), the metrics over all
            classes of the P resamples: float64 (P,) by name, NaN where nothing can be measured.
        outcomes: (N,), what came out of each image: bool, whether a classifier is right; int64 of
            detectors, equal if the same detections by rank are right or wrong (in the same run).
    """

    metrics: dict
    resampled: Callable[[np.ndarray], dict[str, np.ndarray]]
    outcomes: np.ndarray


class DetectionMetrics:
    """Average precision (COCOeval) on the images of a data set.

    Args:
        data: Whose ground truth to compare with.
        num_images: The first so many images.
    """

    def __init__(self, data: AnalysisData, num_images: int) -> None:
        from pycocotools.coco import COCO  # which comes with MMDetection

        self.classes = data.classes
        annotations = []
        for index in range(num_images):
            objects = data.objects(index)
            for box, label, area, crowd in zip(
                objects.boxes, objects.labels, objects.areas, objects.crowd, strict=True
            ):
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index,
                        'category_id': int(label),
                        'bbox': [*map(float, box[:2]), *map(float, box[2:] - box[:2])],
                        'area': float(area),
                        'iscrowd': int(crowd),
                    }
                )
        self._truth = COCO()
        self._truth.dataset = {
            'images': [{'id': index} for index in range(num_images)],
            'annotations': annotations,
            'categories': [{'id': i, 'name': name} for i, name in enumerate(self.classes)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth.createIndex()

    def __call__(self, found: BoxRecords, images: np.ndarray | None = None) -> dict:
        """Evaluate detections.

        Args:
            found: In all images.
            images: int (m,), those that count. Default: all.

        Returns:
            ``AP``, ``AP50``, ``AP small``, ``AP medium``, ``AP large``, ``per_class``, in 0..1.
        """
        return self.evaluated(found, images).metrics

    def evaluated(self, found: BoxRecords, images: np.ndarray | None = None) -> Evaluated:
        """Evaluate detections, with resamples of all images of the data set at hand.

        Args:
            found, images: As when called.
        """
        from pycocotools.cocoeval import COCOeval

        image, boxes, scores, labels = found.image, found.box, found.score, found.label
        if len(image) == 0:
            # COCO's API cannot read an empty list; one detection outside of every image finds
            # nothing either.
            image, scores, labels = np.zeros(1, int), np.zeros(1), np.zeros(1, int)
            boxes = np.array([[-2.0, -2.0, -1.0, -1.0]])
        rows = np.column_stack(
            [image, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels]
        ).astype(np.float64)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, self._truth.loadRes(rows), 'bbox')
            evaluation.params.maxDets = [1, 10, _MAX_DETECTIONS]
            if images is not None:
                evaluation.params.imgIds = images.tolist()
            evaluation.evaluate()
            evaluation.accumulate()
        # IoU thresholds, recalls, classes, areas; -1 where a class has no object of that size.
        precision = evaluation.eval['precision'][..., -1]
        metrics = {
            'AP': _mean(precision[:, :, :, 0]),
            'AP50': _mean(precision[0, :, :, 0]),
            **{name: _mean(precision[:, :, :, area]) for name, area in _AREAS.items()},
            'per_class': {
                name: _mean(precision[:, :, i, 0]) for i, name in enumerate(self.classes)
            },
        }
        return Evaluated(metrics, partial(_resampled_ap, evaluation), _outcomes(evaluation))


def _outcomes(evaluation: COCOeval) -> np.ndarray:
    areas, images = len(evaluation.params.areaRng), len(evaluation.params.imgIds)
    # COCOeval's order: classes, areas, images; objects of all sizes come first.
    of_classes = [
        evaluation.evalImgs[start : start + images]
        for start in range(0, len(evaluation.evalImgs), areas * max(images, 1))
    ]

    def outcome(of_image: tuple[dict | None, ...]) -> int:
        return hash(
            tuple(
                one and (*((one[key] > 0).tobytes() for key in ('dtMatches', 'dtIgnore')),)
                for one in of_image
            )
        )

    return np.array([outcome(one) for one in zip(*of_classes, strict=True)], np.int64)


def _resampled_ap(evaluation: COCOeval, times: np.ndarray) -> dict[str, np.ndarray]:
    areas, images = len(evaluation.params.areaRng), len(evaluation.params.imgIds)
    # COCOeval's order: classes, areas, images.
    curves = [
        _Curve.of_class([one for one in evaluation.evalImgs[start : start + images] if one])
        for start in range(0, len(evaluation.evalImgs), images)
    ]
    thresholds, times = evaluation.params.recThrs, times.astype(np.float32)
    # Classes, areas, IoU thresholds, resamples.
    ap = np.stack([curve.resampled(times, thresholds) for curve in curves])
    ap = ap.reshape(-1, areas, *ap.shape[1:])

    def mean(values: np.ndarray) -> np.ndarray:
        known = ~np.isnan(values)
        number = known.sum(0)
        total = np.where(known, values, 0).sum(0)
        return np.divide(total, number, out=np.full(len(number), np.nan), where=number > 0)

    return {
        'AP': mean(ap[:, 0].mean(1)),
        'AP50': mean(ap[:, 0, 0]),
        **{name: mean(ap[:, area].mean(1)) for name, area in _AREAS.items()},
    }


@dataclass(frozen=True, eq=False)
class _Curve:
    """Detections of one class (in one range of areas), by falling score; D of them, T IoUs."""

    image: np.ndarray  #: int (D,)
    correct: np.ndarray  #: bool (T, D)
    counted: np.ndarray  #: bool (T, D), correct or wrong; others are ignored
    objects: np.ndarray  #: int (G,), the image of each object there is to find

    @classmethod
    def of_class(cls, images: list[dict]) -> _Curve:
        """From the entries of ``COCOeval.evalImgs``."""
        if not images:
            none = np.zeros(0, int)
            return cls(none, np.zeros((0, 0), bool), np.zeros((0, 0), bool), none)
        scores = np.concatenate([one['dtScores'] for one in images])
        order = np.argsort(-scores, kind='mergesort')
        matched, ignored = (
            np.concatenate([one[key] for one in images], axis=1)[:, order].astype(bool)
            for key in ('dtMatches', 'dtIgnore')
        )
        image = np.repeat(
            [one['image_id'] for one in images], [len(one['dtScores']) for one in images]
        )
        objects = np.repeat(
            [one['image_id'] for one in images],
            [np.count_nonzero(np.asarray(one['gtIgnore']) == 0) for one in images],
        )
        return cls(image[order].astype(int), matched & ~ignored, ~ignored, objects.astype(int))

    def resampled(self, times: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """AP (T, P) of resamples, float32 (N, P), by recall thresholds; NaN without any object."""
        size = max(1, _BLOCK // max(1, len(self.objects)))
        blocks = range(0, times.shape[1], size)
        return np.hstack([self._resampled(times[:, b : b + size], thresholds) for b in blocks])

    def _resampled(self, times: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        objects = times[self.objects].sum(0)
        ap = np.zeros((_IOUS, times.shape[1]))
        for iou, (correct, counted) in enumerate(zip(self.correct, self.counted, strict=True)):
            places = np.flatnonzero(correct)
            if not len(places):
                continue
            # Precision and recall are wanted at correct detections alone: how many detections that
            # count has each image up to one of them, from the one before on?
            rows = np.flatnonzero(counted[: places[-1] + 1])
            between = sparse.csr_array(
                (
                    np.ones(len(rows), np.float32),
                    (np.searchsorted(places, rows), self.image[rows]),
                ),
                shape=(len(places), len(times)),
            )
            total = np.cumsum(between @ times, axis=0, dtype=np.float64)
            found = np.cumsum(times[self.image[places]], axis=0, dtype=np.float64)
            precision = found / np.maximum(total, 1)
            precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            recall = found / np.maximum(objects, 1)
            # How many thresholds are reached; near one, its own rounding decides.
            nearest = np.rint(recall * (len(thresholds) - 1)).astype(np.int64)
            reached = nearest + (thresholds[nearest] <= recall)
            ap[iou] = (precision * np.diff(reached, axis=0, prepend=0)).sum(0) / len(thresholds)
        ap[:, objects == 0] = np.nan
        return ap


def _mean(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


class ClassificationMetrics:
    """Top-1 accuracy.

    Args:
        classes: Their names.
        true_labels: int (n,), of the images.
    """

    def __init__(self, classes: Sequence[str], true_labels: np.ndarray) -> None:
        self.classes = list(classes)
        self.true_labels = true_labels

    def __call__(self, labels: np.ndarray) -> dict:
        """Evaluate the predicted classes, int (n,).

        Returns:
            ``accuracy`` and ``per_class``, the accuracy on each class's own images, in 0..1; None
            without an image.
        """
        return self.evaluated(labels).metrics

    def evaluated(self, labels: np.ndarray) -> Evaluated:
        """Evaluate the predicted classes, int (n,), with resamples of the images at hand."""
        correct, count = labels == self.true_labels, len(self.classes)
        images = np.bincount(self.true_labels, minlength=count)
        hits = np.bincount(self.true_labels, correct, count)
        metrics = {
            'accuracy': float(correct.mean()) if correct.size else None,
            'per_class': {
                name: float(hit / number) if number else None
                for name, hit, number in zip(self.classes, hits, images, strict=True)
            },
        }

        def resampled(times: np.ndarray) -> dict[str, np.ndarray]:
            return {'accuracy': times[correct].sum(0) / times.sum(0)}

        return Evaluated(metrics, resampled, correct)

    def changed_per_class(self, before: np.ndarray, after: np.ndarray) -> dict[str, list[int]]:
        """How many images of each class become right, and how many wrong; of those with any.

        Args:
            before, after: bool (n,), which images are right.
        """
        count = len(self.classes)
        gained, lost = (
            np.bincount(self.true_labels[changed], minlength=count).tolist()
            for changed in (after & ~before, before & ~after)
        )
        return {
            name: [won, gone]
            for name, won, gone in zip(self.classes, gained, lost, strict=True)
            if won or gone
        }
