"""Class-level polysemanticity against numbers found by hand."""

import math

import numpy as np
import pytest

from mmdet_moe.analysis.statistics.evaluation import ClassificationMetrics
from mmdet_moe.analysis.statistics.polysemanticity import class_drops, polysemanticity

BEFORE = {'accuracy': 0.7, 'per_class': {'cat': 0.8, 'dog': 0.6, 'emu': None, 'fox': 0.7}}


def zeroed(expert, *values, layer='a'):
    metrics = {'per_class': dict(zip(BEFORE['per_class'], values, strict=True))}
    return {'layer': layer, 'kind': 'zeroed', 'expert': expert, 'metrics': metrics}


def test_by_hand():
    others = [{**zeroed(0, 0, 0, None, 0), 'kind': 'without'}, zeroed(0, 0, 0, None, 0, layer='b')]
    entries = [
        *others,
        zeroed(3, 0.8, 0.2, None, 0.7),  # one class alone
        zeroed(5, 0.4, 0.4, None, 0.8),  # 0.4 and 0.2; the gain is no drop
        zeroed(6, 0.9, 0.6, None, 0.7),  # none
    ]
    found = polysemanticity('a', BEFORE, entries)
    assert found['experts'] == [3, 5, 6]
    assert found['values'] == pytest.approx([0, 0.5, None], abs=1e-12)
    assert found['classes'] == ['dog', 'cat', None]
    assert found['drops'] == pytest.approx([0.4, 0.4, 0])
    assert found['mean'] == pytest.approx(0.25)
    assert (found['num_zeroed'], found['num_mattering']) == (3, 2)
    assert found['largest'] is None  # nothing is known of the images
    drops = class_drops('a', BEFORE, entries)
    np.testing.assert_allclose(drops[5], [0.4, 0.2, 0, 0])


def zeroed_experts(seed, lost=0.0, images=1000, num_experts=8, num_classes=20):
    """Each expert turns 1 % of all images right, and 1 % wrong; the third a share of class 7."""
    rng = np.random.default_rng(seed)
    true, right = rng.integers(0, num_classes, images), rng.random(images) < 0.8
    metrics = ClassificationMetrics([str(c) for c in range(num_classes)], true)
    entries = []
    for expert in range(num_experts):
        draw = rng.random(images)
        after = np.where(right, draw > 0.0125, draw < 0.05)
        if expert == 3:
            after &= (true != 7) | (rng.random(images) >= lost)
        entry = {'layer': 'a', 'kind': 'zeroed', 'expert': expert}
        entry['metrics'] = metrics(np.where(after, true, -1))
        entry['changed_per_class'] = metrics.changed_per_class(right, after)
        entries.append(entry)
    return polysemanticity('a', metrics(np.where(right, true, -1)), entries)


def test_no_expert_is_named_from_noise():
    found = [zeroed_experts(seed, images=200) for seed in range(60)]
    assert np.mean([max(one['drops']) for one in found]) > 0.1  # as large as that
    assert sum(one['largest'] is not None for one in found) <= 5  # of binomial (60, 0.05): 3


def test_the_expert_that_a_class_hangs_on_is_named():
    for seed in range(10):
        largest = zeroed_experts(seed, lost=0.6)['largest']
        assert (largest['expert'], largest['class']) == (3, '7')
        assert largest['drop'] == pytest.approx(0.48, abs=0.2)  # 60 % of 80 %
        assert largest['p_adjusted'] < 0.05


def test_the_bounds():
    """All classes alike: sqrt(C - 1); nobody matters: no mean; nobody was zeroed: nothing."""
    names = [str(i) for i in range(10)]
    before = {'per_class': dict.fromkeys(names, 0.9)}
    entry = {'layer': 'a', 'kind': 'zeroed', 'expert': 0}
    alike = {**entry, 'metrics': {'per_class': dict.fromkeys(names, 0.6)}}
    assert polysemanticity('a', before, [alike])['mean'] == pytest.approx(math.sqrt(9))
    found = polysemanticity('a', before, [{**entry, 'metrics': before}])
    assert (found['mean'], found['num_mattering'], found['values']) == (None, 0, [None])
    assert polysemanticity('a', before, []) is None
    assert polysemanticity('b', before, [alike]) is None
