"""Regrets and confusions against sums by hand, scikit-learn and SciPy."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import confusion_matrix

from mmdet_moe.analysis.interventions import Intervention
from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ChangedClassRecords,
    ClassifierRecords,
    ClassRecords,
    DetectionRecords,
    DetectorRecords,
    ImageRecords,
    LinkRecords,
    ObjectRecords,
)
from mmdet_moe.analysis.statistics.counterfactual import (
    Alone,
    confusions,
    counterfactuals,
    object_scores,
    said,
    summary,
)

A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 60, 20]


def boxes(*rows):
    """Detections of (image, box, score, label)."""
    image, box, score, label = zip(*rows, strict=True) if rows else ([], [], [], [])
    return BoxRecords(
        np.array(image, np.int32),
        np.array(box, np.float32).reshape(-1, 4),
        np.array(score, np.float32),
        np.array(label, np.int32),
    )


def objects(*rows):
    """Objects of (image, box, label, is a crowd)."""
    image, box, label, crowd = zip(*rows, strict=True)
    return ObjectRecords(
        np.array(image, np.int32), np.array(box, np.float32), np.array(label, np.int32),
        np.array(crowd, bool), np.zeros(len(image), np.int32),
    )  # fmt: skip


def links(chosen, num_experts=2):
    """One decision behind each object whose expert is known; most of its weight is the expert's."""
    owner = np.flatnonzero(np.array(chosen) >= 0)
    weights = np.full((len(owner), num_experts), 0.25, np.float32)
    weights[np.arange(len(owner)), np.array(chosen)[owner]] = 0.75
    return LinkRecords(owner, owner, np.zeros(len(owner), np.int32), np.ones(len(owner)), weights)


def study(records, changed, interventions, classes, is_detector):
    return SimpleNamespace(
        records=records,
        changed=type('Files', (list,), {'num_images': 2})(changed),
        interventions=interventions,
        data=type('Data', (list,), {'classes': classes})([0, 1]),
        layers={'layer': None},
        is_detector=is_detector,
        score_thr=0.3,
    )


ONLY = [Intervention('layer', *what) for what in (('only', 0), ('equal',), ('only', 1))]


def test_score_of_an_object():
    """Class, overlap and image have to fit; of several detections the best one counts."""
    found = boxes(
        (3, A, 0.9, 1),  # another class
        (3, A, 0.4, 0),
        (3, [0, 0, 10, 5], 0.6, 0),  # an IoU of exactly one half
        (3, [0, 0, 10, 4.9], 0.8, 0),  # less
        (5, A, 0.99, 0),  # another image
    )
    truth = objects((3, A, 0, False), (3, B, 0, False), (4, A, 0, False))
    assert object_scores(found, truth) == pytest.approx([0.6, 0, 0])


def test_confusions_by_hand():
    """Own class first; what is left takes what is left; crowds and duplicates."""
    truth = objects((0, A, 0, False), (0, B, 1, False), (0, C, 2, True), (1, A, 2, False))
    found = boxes(
        (0, A, 0.9, 1),  # the object is taken by the correct one below: background
        (0, A, 0.5, 0),  # correct
        (0, B, 0.8, 2),  # takes class 1 for 2
        (0, B, 0.7, 0),  # too late: background
        (0, C, 0.9, 2),  # on a crowd of its class: does not count
        (1, B, 0.9, 0),  # nothing there
    )
    table = np.zeros((4, 4), int)
    table[0, 0] = table[1, 2] = table[3, 1] = 1
    table[3, 0] = 2
    np.testing.assert_array_equal(confusions(found, truth, 3), table)


def detector_records():
    truth = objects((0, A, 0, False), (0, B, 1, False), (0, C, 0, True), (1, A, 1, False))
    found = boxes((0, A, 0.7, 0), (1, A, 0.5, 1))
    detections = DetectionRecords(**vars(found), level=np.zeros(2), match=np.array([0, 3]))
    layer = SimpleNamespace(links=links([0, 1, 0, -1]))
    return DetectorRecords(ImageRecords(None, None), detections, truth, [layer])


def test_detector_by_hand():
    """Two experts, three objects, of which one has no decision behind it."""
    alone_0 = boxes((0, A, 0.5, 0), (0, B, 0.6, 1), (1, A, 0.2, 1))
    alone_1 = boxes((0, A, 0.9, 0), (0, B, 0.8, 0))
    changed = [[alone_0, boxes(), alone_1]]
    result = counterfactuals(study([detector_records()], changed, ONLY, ['a', 'b'], True))['layer']
    assert (result['num_objects'], result['num_unknown'], result['num_images']) == (2, 1, 1)
    # A: 0.5 and 0.9, chosen is 0. B: 0.6 and 0 (wrong class), chosen is 1.
    values = {
        'chosen': (0.5 + 0) / 2, 'random': (0.7 + 0.3) / 2, 'oracle': (0.9 + 0.6) / 2,
        'regret': (0.4 + 0.6) / 2, 'model': 0.35, 'best_single': 0.55, 'over_random': 0.25 - 0.5,
        'over_best_single': 0.25 - 0.55, 'best_share': 0, 'best_share_random': 0.5,
    }  # fmt: skip
    assert {name: result[name]['value'] for name in values} == pytest.approx(values)
    assert [entry['value'] for entry in result['alone']] == pytest.approx([0.55, 0.45])
    assert [entry['value'] for entry in result['regret_by_expert']] == pytest.approx([0.4, 0.6])
    assert result['regret_by_class']['b']['value'] == pytest.approx(0.6)
    assert result['regret_by_size']['small']['num'] == 2
    assert result['regret_by_size']['large'] == {'value': None, 'interval': None, 'num': 0}
    assert result['regret']['interval'] is None  # of one image
    assert result['best_single_expert'] == 0
    assert result['num_differing'] == 2
    confusion = result['confusion']
    assert confusion['true'] == ['a', 'b', 'background']
    assert confusion['predicted'] == ['a', 'b', 'missed']
    # Expert 0 does not reach the threshold in the second image, which expert 1 leaves empty.
    assert confusion['counts'] == [
        [[1, 0, 0], [0, 1, 1], [0, 0, 0]],
        [[1, 0, 0], [1, 0, 1], [0, 0, 0]],
    ]
    assert 'not told from a random one' in said(result)  # by one image
    worse = {'over_random': {'value': -0.25, 'interval': [-0.3, -0.2]}}
    assert 'worse than a random one' in said({**result, **worse})
    assert '-0.250' in said(result)


def test_classifier_against_scikit_learn():
    """Confusions, accuracies, and the choice that is always right."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 40).astype(np.int32)
    predicted = rng.integers(0, 3, (40, 3)).astype(np.int32)
    right = predicted[:, [0, 2]] == label[:, None]
    chosen = right.argmax(1)
    sure = np.ones(40, np.float32)
    classes = ClassRecords(label, predicted[:, 1], sure, sure, np.full(40, -1))
    images = ImageRecords(np.arange(40, dtype=np.int32), np.full((40, 2), 8, np.int32))
    records = ClassifierRecords(images, classes, [SimpleNamespace(links=links(chosen))])
    changed = [ChangedClassRecords(predicted)]
    names = ['a', 'b', 'c']
    result = counterfactuals(study([records], changed, ONLY, names, False))['layer']
    for expert, number in enumerate((0, 2)):
        np.testing.assert_array_equal(
            result['confusion']['counts'][expert], confusion_matrix(label, predicted[:, number])
        )
        assert result['alone'][expert]['value'] == pytest.approx(right[:, expert].mean())
    assert result['regret']['value'] == 0
    assert result['best_share']['value'] == 1
    assert result['oracle']['value'] == pytest.approx(right.any(1).mean())
    assert result['model']['value'] == pytest.approx((predicted[:, 1] == label).mean())
    assert result['regret_by_size'] is None
    assert 'better than a random one' in said(result)


def test_interval_is_that_of_scipy():
    """With one object in each image, the percentiles of the plain bootstrap of the mean."""
    rng = np.random.default_rng(1)
    scores = rng.random((80, 3))
    alone = Alone(
        np.arange(80), np.zeros(80, int), np.full(80, 50.0), rng.integers(0, 3, 80),
        scores[:, 0], scores,
    )  # fmt: skip
    found = summary(alone, None, ['a'], 0.3)
    reference = stats.bootstrap(
        (scores[:, 0],), np.mean, n_resamples=5000, method='percentile', rng=2
    ).confidence_interval
    assert found['model']['interval'] == pytest.approx(list(reference), abs=0.006)


def test_interval_counts_images_not_objects():
    """Objects of one image that are alike say no more than one of them."""
    rng = np.random.default_rng(1)
    score = np.repeat(rng.random(30), 50)
    alone = Alone(
        np.repeat(np.arange(30), 50), np.zeros(1500, int), np.full(1500, 50.0),
        np.zeros(1500, int), score, score[:, None],
    )  # fmt: skip
    low, high = summary(alone, None, ['a'], 0.3)['model']['interval']
    assert high - low == pytest.approx(2 * 1.96 * score.std() / np.sqrt(30), rel=0.15)


def test_a_class_on_few_images_has_no_interval():
    """Of 100 images one has an object of class b, and five have one of class c."""
    rng = np.random.default_rng(1)
    image = np.append(np.arange(100), [0, *range(5)])
    label = np.array([0] * 100 + [1] + [2] * 5)
    scores = rng.random((106, 2))
    alone = Alone(image, label, np.full(106, 50.0), label % 2, scores[:, 0], scores)
    found = summary(alone, None, ['a', 'b', 'c'], 0.3)['regret_by_class']
    assert [(found[c]['num'], found[c]['interval'] is None) for c in 'abc'] == [
        (100, False), (1, True), (5, False)
    ]  # fmt: skip


def test_a_model_may_know_more_classes_than_the_images():
    """Without names, the images' labels are the only classes that are known; the model says 4."""
    label, sure = np.array([0, 1, 0, 1, 0, 1], np.int32), np.ones(6, np.float32)
    predicted = np.array([[0, 4], [1, 1], [0, 0], [4, 1], [0, 0], [1, 1]], np.int32)
    classes = ClassRecords(label, label, sure, sure, np.full(6, -1))
    images = ImageRecords(np.arange(6, dtype=np.int32), np.full((6, 2), 8, np.int32))
    records = ClassifierRecords(images, classes, [SimpleNamespace(links=links(label))])
    changed = [ChangedClassRecords(predicted[:, [0, 0, 1]])]
    found = counterfactuals(study([records], changed, ONLY, ['0', '1'], False))['layer']
    names = found['confusion']['predicted']
    assert names == found['confusion']['true'] == ['0', '1', '2', '3', '4']
    for expert in (0, 1):
        counts = confusion_matrix(label, predicted[:, expert], labels=range(5))
        np.testing.assert_array_equal(found['confusion']['counts'][expert], counts)
    assert list(found['regret_by_class']) == ['0', '1']


def test_nothing_is_told_without_interventions():
    assert counterfactuals(study([detector_records()], [], [], ['a', 'b'], True)) == {'layer': None}
    others = [Intervention('layer', 'zeroed', 0)]
    changed = [[boxes()]]
    made = counterfactuals(study([detector_records()], changed, others, ['a', 'b'], True))
    assert made == {'layer': None}
    assert said(None) is None
