"""Matching against loops over boxes, and against the matches of COCO's own evaluation; the reasons
against TIDE's definitions, one box after the other.
"""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_moe.analysis.statistics.matching import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    IGNORED,
    LOCALISATION,
    MISSED,
    UNMATCHED,
    match,
    reasons,
)


def random_image(rng, integers, detections=12, objects=6, classes=2):
    """Detections near the objects, with many ties if everything is an integer."""
    true = rng.uniform(0, 40, (objects, 4))
    true[:, 2:] = true[:, :2] + rng.uniform(5, 30, (objects, 2))
    if objects > 2:
        true[1] = true[0]  # two objects at one place
    boxes = rng.uniform(0, 40, (detections, 4))
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(2, 30, (detections, 2))
    near = rng.random(detections) < 0.7
    if objects:
        boxes[near] = true[rng.integers(0, objects, near.sum())] + rng.normal(0, 3, (near.sum(), 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = rng.random(detections)
    if integers:
        boxes, true, scores = boxes.round(), true.round(), scores.round(1)
    labels, true_labels = rng.integers(0, classes, detections), rng.integers(0, classes, objects)
    if objects > 2:
        true_labels[1] = true_labels[0]
    crowd = rng.random(objects) < 0.25
    return (
        boxes.astype(np.float32), scores.astype(np.float32), labels,
        true.astype(np.float32), true_labels, crowd,
    )  # fmt: skip


def overlap(box, other, crowd):
    box, other = [float(v) for v in box], [float(v) for v in other]
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0) * max(height, 0)
    own = (box[2] - box[0]) * (box[3] - box[1])
    if crowd:
        return shared / own
    return shared / (own + (other[2] - other[0]) * (other[3] - other[1]) - shared)


def match_by_hand(boxes, scores, labels, true_boxes, true_labels, crowd, threshold=0.5):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    taken, found = set(), [UNMATCHED] * len(boxes)
    for i in order:
        best, best_overlap = None, 0
        for j in range(len(true_boxes)):
            if labels[i] != true_labels[j] or crowd[j] or j in taken:
                continue
            value = overlap(boxes[i], true_boxes[j], False)
            # Of equally good ones COCO takes the last.
            if value >= threshold and value >= best_overlap:
                best, best_overlap = j, value
        if best is not None:
            found[i] = best
            taken.add(best)
        elif any(
            crowd[j]
            and labels[i] == true_labels[j]
            and overlap(boxes[i], true_boxes[j], True) >= threshold
            for j in range(len(true_boxes))
        ):
            found[i] = IGNORED
    return found


def match_by_coco(boxes, scores, labels, true_boxes, true_labels, crowd, threshold=0.5):
    """From ``evalImgs``; detections are told apart by their order in the results."""
    xywh = np.concatenate([true_boxes[:, :2], true_boxes[:, 2:] - true_boxes[:, :2]], 1)
    truth = COCO()
    truth.dataset = {
        'images': [{'id': 7}],
        'categories': [{'id': int(c)} for c in range(2)],
        'annotations': [
            {
                'id': j + 1, 'image_id': 7, 'category_id': int(true_labels[j]),
                'bbox': [float(v) for v in xywh[j]], 'area': float(xywh[j, 2] * xywh[j, 3]),
                'iscrowd': int(crowd[j]),
            }
            for j in range(len(xywh))
        ],
    }  # fmt: skip
    results = [
        {
            'image_id': 7, 'category_id': int(labels[i]), 'score': float(scores[i]),
            'bbox': [float(v) for v in (*boxes[i, :2], *(boxes[i, 2:] - boxes[i, :2]))],
        }
        for i in range(len(boxes))
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
        evaluation.params.iouThrs = np.array([threshold])
        evaluation.evaluate()
    found = np.full(len(boxes), UNMATCHED)
    for image in evaluation.evalImgs:
        if image is None or image['aRng'] != evaluation.params.areaRng[0]:
            continue
        for i, number, ignored in zip(
            image['dtIds'], image['dtMatches'][0], image['dtIgnore'][0], strict=True
        ):
            if ignored:
                found[i - 1] = IGNORED
            elif number:
                found[i - 1] = number - 1
    return found.tolist()


@pytest.mark.parametrize('integers', [False, True])
def test_random_images(integers):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(150):
        image = random_image(rng, integers)
        found = match(*image)
        assert found.dtype == np.int64
        assert found.tolist() == match_by_hand(*image) == match_by_coco(*image)
        kinds |= set(np.minimum(found, 0).tolist())
    assert kinds == {0, UNMATCHED, IGNORED}


def test_order_of_equal_scores_is_kept():
    boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10]], np.float32)
    one = (np.array([[0, 0, 10, 10]], np.float32), np.array([0]), np.array([False]))
    labels, scores = np.zeros(2, int), np.full(2, 0.5, np.float32)
    assert match(boxes, scores, labels, *one).tolist() == [0, UNMATCHED]
    assert match(boxes, scores + np.array([0, 1]), labels, *one).tolist() == [UNMATCHED, 0]


def test_threshold_is_included():
    objects = (np.array([[0, 0, 2, 1]], np.float32), np.array([0]), np.array([False]))
    box = np.array([[0, 0, 1, 1]], np.float32)  # exactly half of the object
    assert match(box, np.ones(1), np.zeros(1, int), *objects).tolist() == [0]
    assert match(box, np.ones(1), np.zeros(1, int), *objects, threshold=0.51).tolist() == [-1]


def test_lower_scores_change_nothing():
    rng = np.random.default_rng(1)
    for _ in range(50):
        boxes, scores, labels, *truth = random_image(rng, True)
        found = match(boxes, scores, labels, *truth)
        kept = scores >= 0.5
        assert match(boxes[kept], scores[kept], labels[kept], *truth).tolist() == (
            found[kept].tolist()
        )


@pytest.mark.parametrize(('detections', 'objects'), [(0, 0), (0, 3), (4, 0)])
def test_nothing_to_match(detections, objects):
    image = random_image(np.random.default_rng(2), True, detections, objects)
    assert match(*image).tolist() == [UNMATCHED] * detections


def test_empty_boxes():
    """A detection without area matches nothing, and nothing is divided by 0."""
    box = np.array([[5, 5, 5, 5]], np.float32)
    truth = (np.array([[0, 0, 10, 10], [5, 5, 5, 5]], np.float32), np.zeros(2, int))
    for crowd in ([False, False], [True, True]):
        with np.errstate(all='raise'):
            found = match(box, np.ones(1), np.zeros(1, int), *truth, np.array(crowd))
        assert found.tolist() == [UNMATCHED]


# Reasons ------------------------------------------------------------------------------------------


def reason_by_hand(i, boxes, labels, found, true_boxes, true_labels, crowd):
    """(type, object) of one detection, as section 2.2 of arXiv 2008.08115 and its code say it."""
    if found[i] >= 0:
        return CORRECT, found[i]
    same, other = [(0, -1)], [(0, -1)]
    for j in range(len(true_boxes)):
        if not crowd[j]:
            mine = same if labels[i] == true_labels[j] else other
            mine.append((overlap(boxes[i], true_boxes[j], False), j))
    (best, j), (best_other, k) = (max(x, key=lambda pair: pair[0]) for x in (same, other))
    if 0.1 <= best <= 0.5:
        return LOCALISATION, j
    if best_other >= 0.5:
        return CLASSIFICATION, k
    if best > 0.5:
        return DUPLICATE, j
    return (BACKGROUND, -1) if max(best, best_other) <= 0.1 else (BOTH, k)


def test_reasons_of_random_images():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(100):
        boxes, scores, labels, *truth = random_image(rng, False, classes=3)
        found = match(boxes, scores, labels, *truth)
        kept = found != IGNORED
        boxes, scores, labels, found = (x[kept] for x in (boxes, scores, labels, found))
        why = reasons(boxes, scores, labels, found, *truth)
        expected = [reason_by_hand(i, boxes, labels, found, *truth) for i in range(len(boxes))]
        assert list(zip(why.kind.tolist(), why.partner.tolist(), strict=True)) == expected
        for (kind, j), box, iou in zip(expected, boxes, why.overlap, strict=True):
            assert (kind == BACKGROUND) == np.isnan(iou)
            assert kind == BACKGROUND or iou == pytest.approx(overlap(box, truth[0][j], False))
        for j in range(len(truth[0])):
            # The match, else the highest score among those that only one thing is wrong with.
            meant = [
                (kind == CORRECT, scores[i], i, kind) for i, (kind, k) in enumerate(expected)
                if k == j and kind in (CORRECT, LOCALISATION, CLASSIFICATION)
            ]  # fmt: skip
            *_, i, kind = max(meant, default=(-1, MISSED))
            assert (why.object_partner[j], why.object_kind[j]) == (i, kind)
        seen |= set(why.kind.tolist()) | set(why.object_kind.tolist())
    assert seen == set(range(7))


@pytest.mark.parametrize(('detections', 'objects'), [(0, 3), (4, 0)])
def test_reasons_without_anything(detections, objects):
    boxes, scores, labels, *truth = random_image(
        np.random.default_rng(2), True, detections, objects
    )
    why = reasons(boxes, scores, labels, np.full(detections, UNMATCHED), *truth)
    assert why.kind.tolist() == [BACKGROUND] * detections
    assert why.object_kind.tolist() == [MISSED] * objects
