"""Main experts from layer to layer, against scikit-learn's contingency table."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.statistics.flow import flow, step


def decisions(mains, num_experts, per_image=1, order=None):
    """Decisions with given main experts, ``per_image`` levels of each image."""
    count = len(mains)
    image, level = np.divmod(np.arange(count), per_image)
    weights = np.full((count, num_experts), 0.1)
    weights[np.arange(count), mains] = 0.9
    made = (image, image * 2**28 + level, level, np.full((count, 2), np.nan), weights)
    order = np.arange(count) if order is None else order
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
    found = step(halves(decisions(a, 3, 2), decisions(b, 4, 2)))
    assert (found['unit'], found['num_units']) == ('decision', 120)
    np.testing.assert_array_equal(np.array(found['counts'])[:, :3], contingency_matrix(a, b))
    assert found['mi'] == pytest.approx(mutual_info_score(a, b))
    assert found['p_value'] == 1 / 200
    assert found['chance'] < 0.1 * found['mi']


def test_what_all_images_have_in_common_is_chance():
    """Both layers follow the level alone: nothing in common beyond it, in whatever order."""
    level = np.tile([0, 1], 50)
    order = np.argsort(level, kind='stable')  # level by level, as a batch comes
    found = step([(decisions(level, 2, 2, order), decisions(1 - level, 2, 2, order))])
    assert found['mi'] == pytest.approx(np.log(2))
    assert (found['chance'], found['p_value']) == (pytest.approx(np.log(2)), 1)


def test_other_items_are_summed_up_by_image():
    """Two levels of an image against one decision; the sum of the weights says who is its main."""
    a = np.array([0, 1, 1, 1, 2, 2])
    first = decisions(a, 3, 2)
    first.weights[0] = [0.95, 0.05, 0]  # outweighs the 0.9 of the other level
    second = decisions(np.array([1, 0, 0]), 2)
    found = step([(first, second)])
    assert (found['unit'], found['num_units']) == ('image', 3)
    assert found['counts'] == [[0, 1], [1, 0], [1, 0]]


def test_layers_in_the_order_of_the_model():
    """Not in that of their names, and without those that have one expert or very many."""
    experts = {'head': 3, 'many': 65, 'one': 1, 'backbone': 2}
    rows = np.zeros(4, int)
    layers = {name: SimpleNamespace(num_experts=e) for name, e in experts.items()}
    part = SimpleNamespace(
        layers=[SimpleNamespace(decisions=decisions(rows, e)) for e in experts.values()]
    )
    order = ['one', 'backbone', 'many', 'head']
    study = SimpleNamespace(order=order, layers=layers, records=[part])
    found = flow(study)
    assert found['layers'] == ['backbone', 'head']
    (only,) = found['steps']
    assert (only['from'], only['to'], only['counts']) == (
        'backbone',
        'head',
        [[4, 0, 0], [0, 0, 0]],
    )
    study.order = ['one', 'head', 'many']
    assert flow(study) is None
