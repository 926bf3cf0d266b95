"""Outcomes of records that are written down by hand."""

import numpy as np
import pytest

from mmdet_moe.analysis.records.contents import (
    ClassifierRecords,
    ClassRecords,
    DetectionRecords,
    DetectorLayerRecords,
    DetectorRecords,
    ImageRecords,
    LayerRecords,
    LinkRecords,
    ObjectRecords,
    OriginRecords,
)
from mmdet_moe.analysis.statistics.matching import KINDS
from mmdet_moe.analysis.statistics.outcomes import outcomes_of

CAT, DOG = 0, 1


def links(owner, weights):
    n = len(owner)
    return LinkRecords(
        owner=np.array(owner),
        unit=np.arange(n),
        level=np.zeros(n, np.int32),
        share=np.ones(n),
        weights=np.array(weights, np.float32),
    )


def of_layer(kind, *fields):
    """Records of a layer; what outcomes do not read is left empty."""
    names = {'links': fields[0]} | ({'detections': fields[1]} if len(fields) > 1 else {})
    record = kind.__new__(kind)
    for name, value in names.items():
        setattr(record, name, value)
    return record


def detector_records():
    """Image 4: a cat found well, a dog taken for a cat, and a crowd of dogs with a dog on it.
    Image 6: a cat found badly; a background; below the threshold something right.
    """
    objects = ObjectRecords(
        image=np.array([4, 4, 4, 6], np.int32),
        box=np.array(
            [[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 40, 40], [0, 0, 10, 10]], np.float32
        ),
        label=np.array([CAT, DOG, DOG, CAT], np.int32),
        crowd=np.array([False, False, True, False]),
        level=np.array([0, 1, 1, 2], np.int32),
    )
    detections = DetectionRecords(
        image=np.array([4, 4, 4, 6, 6, 6], np.int32),
        box=np.array(
            [[0, 0, 10, 8], [50, 50, 60, 60], [25, 25, 30, 30],
             [0, 0, 10, 4], [80, 80, 90, 90], [0, 0, 10, 10]], np.float32,
        ),
        score=np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.2], np.float32),
        label=np.array([CAT, CAT, DOG, CAT, DOG, CAT], np.int32),
        level=np.array([0, 1, 1, 2, 2, 2], np.int32),
        match=np.array([0, -1, -2, -1, -1, 3]),
    )  # fmt: skip
    origin = OriginRecords(np.arange(6), np.eye(6, 2, dtype=np.float32))
    layer = of_layer(DetectorLayerRecords, links([0, 1, 3], [[1, 0], [0, 1], [0.25, 0.75]]), origin)
    images = ImageRecords(np.array([4, 6], np.int32), np.full((2, 2), 100, np.int32))
    return DetectorRecords(images, detections, objects, [layer])


def test_detector():
    outcomes = outcomes_of([detector_records()], ['head'], 0.3)
    assert outcomes.image.tolist() == [4, 4, 4, 4, 6, 6, 6]
    assert outcomes.is_detection.tolist() == [False, False, True, True, False, True, True]
    assert [KINDS[kind] for kind in outcomes.kind] == [
        'correct', 'classification', 'correct', 'classification',
        'localisation', 'localisation', 'background',
    ]  # fmt: skip
    assert outcomes.partner.tolist() == [2, 2, -2, -2, 1, -1, 0]
    assert outcomes.label.tolist() == [CAT, CAT, CAT, CAT, CAT, CAT, DOG]
    assert outcomes.true_label.tolist() == [CAT, DOG, CAT, DOG, CAT, CAT, -1]
    assert outcomes.counted_label.tolist() == [CAT, DOG, CAT, CAT, CAT, CAT, DOG]
    np.testing.assert_allclose(outcomes.score, [0.9, 0.8, 0.9, 0.8, 0.6, 0.6, 0.5])
    np.testing.assert_allclose(outcomes.iou, [0.8, 1, 0.8, 1, 0.4, 0.4, np.nan])
    # 1 - 0.9 x 0.8 where it is right; 1 for what is not found, the score of what is wrong.
    np.testing.assert_allclose(outcomes.loss, [0.28, 1, 0.28, 0.8, 1, 0.6, 0.5], rtol=1e-6)
    np.testing.assert_allclose(outcomes.size[:3], [10, 10, 80**0.5], rtol=1e-6)
    assert outcomes.level.tolist() == [0, 1, 0, 1, 2, 2, 2]
    np.testing.assert_allclose(
        outcomes.weights['head'],
        [[1, 0], [0, 1], [1, 0], [0, 1], [0.25, 0.75], [0, 0], [0, 0]],
    )


def test_partners_are_those_of_the_image_also_behind_other_files():
    one = outcomes_of([detector_records()], ['head'], 0.3)
    two = outcomes_of([detector_records()] * 2, ['head'], 0.3)
    assert two.partner.tolist() == one.partner.tolist() * 2


def test_without_objects_and_without_detections():
    records = detector_records()
    for threshold, crowd in ((1.0, False), (0.3, True), (1.0, True)):
        records.objects.crowd[:] = crowd
        records.detections.match[:] = -1
        outcomes = outcomes_of([records], ['head'], threshold)
        assert (~outcomes.is_detection).sum() == (0 if crowd else 4)
        assert outcomes.is_detection.sum() == (0 if threshold == 1 else 5)
        assert (outcomes.partner == 0).all() or not crowd
        assert {KINDS[k] for k in outcomes.kind[~outcomes.is_detection]} <= {
            'missed', 'classification', 'localisation'
        }  # fmt: skip


def test_classifier():
    classes = ClassRecords(
        label=np.array([CAT, DOG], np.int32),
        prediction=np.array([CAT, CAT], np.int32),
        score=np.array([0.8, 0.7], np.float32),
        true_score=np.array([0.8, 0], np.float32),
        cluster=np.array([-1, -1], np.int32),
    )
    images = ImageRecords(np.array([0, 1], np.int32), np.array([[10, 20], [10, 20]], np.int32))
    layer = of_layer(LayerRecords, links([0, 1], [[1, 0], [0, 1]]))
    outcomes = outcomes_of([ClassifierRecords(images, classes, [layer])], ['stage'], 0.3)
    assert [KINDS[kind] for kind in outcomes.kind] == ['correct', 'classification']
    assert outcomes.counted_label.tolist() == [CAT, DOG]
    assert outcomes.box.tolist() == [[0, 0, 20, 10]] * 2
    # Cross-entropy; a probability of 0 counts as 1e-7.
    assert outcomes.loss.tolist() == pytest.approx([-np.log(0.8), 7 * np.log(10)], rel=1e-5)
    assert not outcomes.is_detection.any()
