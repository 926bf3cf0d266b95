"""Metrics of what was predicted: AP by COCO's evaluation for detectors, accuracy for classifiers.

``metrics`` dicts as in ``experts.json``: one number per name, and ``per_class`` by class name; None
where there is nothing to measure by (AP of a size or class without objects).
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.records.contents import BoxRecords

_AREAS = {'AP small': 1, 'AP medium': 2, 'AP large': 3}  # indices of COCOeval's area ranges
_MAX_DETECTIONS = 100


class DetectionMetrics:
    """Average precision (COCOeval) on the images of a data set.

    Args:
        data: Whose ground truth to compare with.
        num_images: The first so many images.
    """

    def __init__(self, data: AnalysisData, num_images: int) -> None:
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
        return {
            'AP': _mean(precision[:, :, :, 0]),
            'AP50': _mean(precision[0, :, :, 0]),
            **{name: _mean(precision[:, :, :, area]) for name, area in _AREAS.items()},
            'per_class': {
                name: _mean(precision[:, :, i, 0]) for i, name in enumerate(self.classes)
            },
        }


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
            ``accuracy`` and ``per_class``, the accuracy on each class's own images, in 0..1.
        """
        correct, count = labels == self.true_labels, len(self.classes)
        images = np.bincount(self.true_labels, minlength=count)
        hits = np.bincount(self.true_labels, correct, count)
        return {
            'accuracy': float(correct.mean()),
            'per_class': {
                name: float(hit / number) if number else None
                for name, hit, number in zip(self.classes, hits, images, strict=True)
            },
        }
