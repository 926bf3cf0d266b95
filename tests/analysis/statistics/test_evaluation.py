"""AP against MMDetection's ``CocoMetric``, accuracy by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from scipy.stats import multinomial
from test_matching import random_image

from mmdet_moe.analysis.data import Objects
from mmdet_moe.analysis.records.contents import BoxRecords
from mmdet_moe.analysis.statistics.evaluation import ClassificationMetrics, DetectionMetrics
from mmdet_moe.analysis.statistics.inference import (
    interval,
    paired_interval,
    resampled_images,
)

NAMES = {
    'AP': 'bbox_mAP',
    'AP50': 'bbox_mAP_50',
    'AP small': 'bbox_mAP_s',
    'AP medium': 'bbox_mAP_m',
    'AP large': 'bbox_mAP_l',
}


class Data:
    """Ground truth of some images."""

    classes = ('cat', 'dog', 'unicorn')  # no unicorns anywhere

    def __init__(self, objects):
        self._objects = objects

    def objects(self, index):
        return self._objects[index]


def make(seed, images=12, scale=4.0):
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for index in range(images):
        image = random_image(rng, False, 0 if index == 2 else 12, 0 if index == 3 else 6)
        boxes, scores, labels, true_boxes, true_labels, crowd = image
        boxes, true_boxes = boxes * scale, true_boxes * scale
        sides = true_boxes[:, 2:] - true_boxes[:, :2]
        # As of a mask: smaller than the box.
        areas = sides.prod(1) * rng.uniform(0.5, 1, len(sides)).astype(np.float32)
        objects.append(Objects(true_boxes, true_labels, areas, crowd))
        detections.append((boxes, scores, labels))
    return Data(objects), detections


def by_mmdetection(data, detections, tmp_path):
    annotations = []
    for index in range(len(detections)):
        truth = data.objects(index)
        for box, label, area, crowd in zip(
            truth.boxes, truth.labels, truth.areas, truth.crowd, strict=True
        ):
            annotations.append(
                {
                    'id': len(annotations) + 1, 'image_id': index + 100,
                    'category_id': 5 + int(label), 'area': float(area), 'iscrowd': int(crowd),
                    'bbox': [float(v) for v in (*box[:2], *(box[2:] - box[:2]))],
                }
            )  # fmt: skip
    content = {
        'images': [
            {'id': i + 100, 'width': 640, 'height': 640, 'file_name': f'{i}.jpg'}
            for i in range(len(detections))
        ],
        'categories': [{'id': 5 + i, 'name': name} for i, name in enumerate(data.classes)],
        'annotations': annotations,
    }
    (tmp_path / 'truth.json').write_text(json.dumps(content))
    metric = CocoMetric(str(tmp_path / 'truth.json'), 'bbox', classwise=True)
    metric.dataset_meta = {'classes': data.classes}
    for index, (boxes, scores, labels) in enumerate(detections):
        instances = {
            'bboxes': torch.from_numpy(boxes),
            'scores': torch.from_numpy(scores),
            'labels': torch.from_numpy(labels),
        }
        sample = {'img_id': index + 100, 'ori_shape': (640, 640), 'pred_instances': instances}
        metric.process({}, [sample])
    return metric.evaluate(len(detections))


def columns(detections):
    image = np.repeat(np.arange(len(detections)), [len(d[0]) for d in detections])
    return BoxRecords(image, *(np.concatenate(part) for part in zip(*detections, strict=True)))


@pytest.mark.parametrize('seed', range(3))
def test_ap_is_that_of_mmdetection(seed, tmp_path):
    data, detections = make(seed, scale=(4.0, 4.0, 2.0)[seed])
    expected = by_mmdetection(data, detections, tmp_path)
    found = DetectionMetrics(data, len(detections))(columns(detections))
    assert set(found) == {*NAMES, 'per_class'}
    for name, key in NAMES.items():
        value = expected[f'coco/{key}']
        if value < 0:
            assert found[name] is None
        else:
            assert round(found[name], 3) == pytest.approx(value, abs=1e-9)
    assert 0 < found['AP'] < found['AP50'] < 1
    for name in ('cat', 'dog'):
        value = expected[f'coco/{name}_precision']
        assert round(found['per_class'][name], 3) == pytest.approx(value, abs=1e-9)
    assert found['per_class']['unicorn'] is None


def test_only_the_first_images_count(tmp_path):
    data, detections = make(4)
    expected = by_mmdetection(data, detections[:5], tmp_path)
    found = DetectionMetrics(data, 5)(columns(detections[:5]))
    assert round(found['AP'], 3) == pytest.approx(expected['coco/bbox_mAP'], abs=1e-9)


def test_no_detections():
    data, _ = make(5)
    metrics = DetectionMetrics(data, 12)
    found = metrics(BoxRecords(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)))
    assert {found[name] for name in NAMES} == {0.0}
    assert found['per_class'] == {'cat': 0.0, 'dog': 0.0, 'unicorn': None}


def test_no_objects():
    nothing = Objects(
        np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0), np.zeros(0, bool)
    )
    _, detections = make(6)
    nothing_found = [tuple(part[:0] for part in detections[0])]
    for given in (columns(detections), columns(nothing_found)):
        found = DetectionMetrics(Data([nothing] * 12), 12)(given)
        assert found == {**dict.fromkeys(NAMES), 'per_class': dict.fromkeys(Data.classes)}


def test_evaluations_do_not_change_each_other():
    data, detections = make(7)
    metrics = DetectionMetrics(data, 12)
    found = columns(detections)
    first = metrics(found)
    assert metrics(replace(found, score=1 - found.score)) != first
    assert metrics(found) == first


def test_perfect_detections():
    data, _ = make(8)
    boxes = [data.objects(i).boxes[~data.objects(i).crowd] for i in range(12)]
    labels = [data.objects(i).labels[~data.objects(i).crowd] for i in range(12)]
    detections = [(b, np.ones(len(b), np.float32), la) for b, la in zip(boxes, labels, strict=True)]
    found = DetectionMetrics(data, 12)(columns(detections))
    assert found['AP'] == found['AP50'] == found['per_class']['cat'] == pytest.approx(1)


def test_accuracy():
    metrics = ClassificationMetrics(['a', 'b', 'c'], np.array([0, 1, 0, 0]))
    found = metrics(np.array([0, 1, 1, 0]))
    assert found == {'accuracy': 0.75, 'per_class': {'a': 2 / 3, 'b': 1.0, 'c': None}}
    # Of a data set, say, of which no image was drawn.
    none = np.zeros(0, int)
    assert ClassificationMetrics(['a'], none)(none) == {'accuracy': None, 'per_class': {'a': None}}


@pytest.mark.parametrize('seed', [0, 2])
def test_resampled_ap_is_that_of_repeated_images(seed):
    """A literal run of COCOeval on a data set in which the images are repeated."""
    data, detections = make(seed, scale=(4.0, 4.0, 2.0)[seed])
    evaluated = DetectionMetrics(data, 12).evaluated(columns(detections))
    draws = np.sort(np.random.default_rng(seed).integers(0, 12, (8, 12)), axis=1)
    draws[0], draws[1] = np.arange(12), 2  # as it is; and an image without detections alone
    times = np.stack([np.bincount(draw, minlength=12) for draw in draws], axis=1)
    found = evaluated.resampled(times)
    assert set(found) == set(NAMES)
    for number, draw in enumerate(draws):
        repeated = Data([data.objects(i) for i in draw])
        expected = DetectionMetrics(repeated, 12)(columns([detections[i] for i in draw]))
        for name in NAMES:
            value = np.nan if expected[name] is None else expected[name]
            assert found[name][number] == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_resampled_accuracy():
    metrics = ClassificationMetrics(['a', 'b'], np.array([0, 1, 0]))
    times = np.array([[1, 3, 0], [1, 0, 2], [1, 0, 1]])
    found = metrics.evaluated(np.array([0, 1, 1])).resampled(times)
    assert found['accuracy'].tolist() == pytest.approx([2 / 3, 1, 2 / 3])


def test_intervals_lie_around_the_estimate():
    """Those of a mean, by the normal distribution; a shift of all resamples is a bias."""
    rng = np.random.default_rng(0)
    correct = rng.random(500) < 0.8
    evaluated = ClassificationMetrics(['a'], np.zeros(500, int)).evaluated(~correct * 1)
    estimate = evaluated.metrics['accuracy']
    resampled = evaluated.resampled(resampled_images(500, 999))['accuracy']
    error = 1.96 * np.sqrt(estimate * (1 - estimate) / 500)
    for shift in (0, 0.1):
        found = interval(resampled + shift, estimate, 5)
        assert found == pytest.approx([estimate - error, estimate + error], abs=0.15 * error)
    assert interval(np.full(9, np.nan), 0.5, 5) is None
    assert interval(np.zeros(9), 0.5, 4) is None  # few images say the same by chance


def paired(gained, lost, images):
    """So many images that become right, and wrong, of which nothing else is known."""
    before, after = np.zeros((2, images), bool)
    after[:gained] = before[gained : gained + lost] = True
    return paired_interval(before, after)


def test_effects_on_accuracy_that_no_image_shows():
    """Without any change, d is just rejected at (n d)^2 = z^2 n d (1 - d)."""
    end = 1.959964**2 / (50 + 1.959964**2)
    assert paired(0, 0, 50) == pytest.approx([-end, end], abs=1e-6)
    low, high = paired(2, 9, 60)
    assert paired(9, 2, 60) == pytest.approx([-high, -low])
    assert low < -7 / 60 < high < 0.01
    assert paired(60, 0, 60)[1] == 1
    assert paired(1, 1, 4) is None
    # Many changes: the normal distribution, of a mean of -1, 0 and 1.
    mean, deviation = (300 - 200) / 4000, np.sqrt((500 / 4000 - (100 / 4000) ** 2) / 4000)
    expected = [mean - 1.96 * deviation, mean + 1.96 * deviation]
    assert paired(300, 200, 4000) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize('images', [20, 50, 100])
@pytest.mark.parametrize(('gains', 'losses'), [(0.02, 0.03), (0.01, 0.02), (0.0, 0.0051)])
def test_a_loss_is_called_none_in_one_of_forty_cases(images, gains, losses):
    """Over all outcomes: the low end lies above -0.005, which less is lost than truly."""
    error = 0.0
    for gained in range(int(images * gains) + 8):
        for lost in range(int(images * losses) + 8):
            outcome = [gained, lost, images - gained - lost]
            probability = multinomial.pmf(outcome, images, [gains, losses, 1 - gains - losses])
            if probability > 1e-6:
                error += probability * (paired(gained, lost, images)[0] >= -0.005)
    assert error <= 0.025


def test_outcomes_tell_which_images_changed():
    data, detections = make(5)
    metrics, found = DetectionMetrics(data, 12), columns(detections)
    before = metrics.evaluated(found).outcomes
    # Other scores in the same order are no change; without its best detection an image has one.
    same = replace(found, score=found.score * 0.5)
    assert (metrics.evaluated(same).outcomes == before).all()
    right = np.flatnonzero(found.image == 5)
    kept = np.setdiff1d(np.arange(len(found.image)), right)
    fewer = BoxRecords(*(getattr(found, name)[kept] for name in BoxRecords.__annotations__))
    changed = metrics.evaluated(fewer).outcomes != before
    assert changed[5]
    assert changed.sum() == 1
