"""Main experts from layer to layer, against scikit-learn's contingency table."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.statistics.flow import Step, flows


def count(made, unit):
    """What a step says of several files; None without such units."""
    step = Step(unit)
    for pair in made:
        step.add(*pair)
    return step.as_dict() if step.fits else None


def decisions(mains, num_experts, per_image=1, order=None):
    """Decisions with given main experts, ``per_image`` levels of each image."""
    rows = np.arange(len(mains))
    image, level = np.divmod(rows, per_image)
    weights = np.full((len(mains), num_experts), 0.1)
    weights[rows, mains] = 0.9
    made = (image, image * 2**28 + level, level, np.full((len(mains), 2), np.nan), weights)
    order = rows if order is None else order
    return DecisionRecords(*(column[order] for column in made))


def halves(first, second):
    """In two files."""
    middle = len(first.unit) // 2
    cut = [slice(None, middle), slice(middle, None)]
    return [
        tuple(DecisionRecords(*(c[part] for c in vars(x).values())) for x in (first, second))
        for part in cut
    ]


def test_decisions_on_the_same_items_are_followed_one_by_one():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 120)
    b = np.where(rng.random(120) < 0.7, a, rng.integers(0, 3, 120))
    found = count(halves(decisions(a, 3, 2), decisions(b, 4, 2)), 'decision')
    assert found['num_units'] == 120
    np.testing.assert_array_equal(np.array(found['counts'])[:, :3], contingency_matrix(a, b))
    assert found['mi'] == pytest.approx(mutual_info_score(a, b))
    assert found['p_value'] == 1 / 200
    assert found['chance'] < 0.1 * found['mi']


def test_what_all_images_have_in_common_is_chance():
    """Both layers follow the level alone: nothing in common beyond it, in whatever order."""
    level = np.tile([0, 1], 50)
    order = np.argsort(level, kind='stable')  # level by level, as a batch comes
    found = count([(decisions(level, 2, 2, order), decisions(1 - level, 2, 2, order))], 'decision')
    assert found['mi'] == pytest.approx(np.log(2))
    assert (found['chance'], found['p_value']) == (pytest.approx(np.log(2)), 1)


def test_other_items_are_summed_up_by_image():
    """Two levels of an image against one decision; the sum of the weights says who is its main."""
    a = np.array([0, 1, 1, 1, 2, 2])
    first = decisions(a, 3, 2)
    first.weights[0] = [0.95, 0.05, 0]  # outweighs the 0.9 of the other level
    second = decisions(np.array([1, 0, 0]), 2)
    assert count([(first, second)], 'decision') is None
    found = count([(first, second)], 'image')
    assert found['num_units'] == 3
    assert found['counts'] == [[0, 1], [1, 0], [1, 0]]


def study(order, **layers):
    """Layers of (experts, decisions for an image) whose main expert is always 0."""
    made = [decisions(np.zeros(4 * each, int), e, each) for e, each in layers.values()]
    part = SimpleNamespace(layers=[SimpleNamespace(decisions=d) for d in made])
    named = {name: SimpleNamespace(num_experts=e) for name, (e, _) in layers.items()}
    return SimpleNamespace(order=order, layers=named, records=[part])


def test_layers_in_the_order_of_the_model():
    """Not in that of their names, and without those that have one expert or very many."""
    layers = {'head': (3, 1), 'many': (65, 1), 'one': (1, 1), 'backbone': (2, 1)}
    (found,) = flows(study(['one', 'backbone', 'many', 'head'], **layers))
    assert (found['unit'], found['layers']) == ('decision', ['backbone', 'head'])
    (only,) = found['steps']
    assert (only['from'], only['to']) == ('backbone', 'head')
    assert only['counts'] == [[4, 0, 0], [0, 0, 0]]
    assert flows(study(['one', 'head', 'many'], **layers)) == []


def test_runs_of_layers_on_the_same_items():
    """All layers by image, and those next to each other that decide for the same by decision."""
    layers = {'a': (2, 4), 'b': (2, 4), 'c': (2, 1), 'd': (3, 5), 'e': (2, 5), 'f': (2, 5)}
    found = flows(study(list('abcdef'), **layers))
    assert [(flow['unit'], ''.join(flow['layers'])) for flow in found] == [
        ('image', 'abcdef'), ('decision', 'ab'), ('decision', 'def'),
    ]  # fmt: skip
    assert [step['num_units'] for step in found[0]['steps']] == [4] * 5
    assert [step['num_units'] for step in found[2]['steps']] == [20] * 2


def test_memory_does_not_grow_with_the_images(monkeypatch):
    """All units are counted; chance is that of some images."""
    monkeypatch.setattr('mmdet_moe.analysis.statistics.flow.MAX_UNITS', 40)
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 400)
    b = np.where(rng.random(400) < 0.7, a, rng.integers(0, 3, 400))
    step = Step('decision')
    for pair in halves(decisions(a, 3, 2), decisions(b, 4, 2)):
        step.add(*pair)
    found = step.as_dict()
    np.testing.assert_array_equal(np.array(found['counts'])[:, :3], contingency_matrix(a, b))
    images = np.concatenate([image for image, *_ in step._kept])
    assert len(images) <= 40
    kept = np.isin(np.arange(400) // 2, images)
    assert found['mi'] == pytest.approx(mutual_info_score(a[kept], b[kept]))
    assert found['p_value'] == 1 / 200


def test_images_that_are_kept_are_of_all_classes(monkeypatch):
    """Two classes that take turns: of every second image, the experts would be one."""
    monkeypatch.setattr('mmdet_moe.analysis.statistics.flow.MAX_UNITS', 200)
    classes = np.arange(4000) % 2
    step = Step('image')
    step.add(decisions(classes, 2), decisions(classes, 2))
    assert step.as_dict()['mi'] == pytest.approx(np.log(2), abs=0.02)
