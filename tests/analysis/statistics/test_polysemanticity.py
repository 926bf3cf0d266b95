"""Class-level polysemanticity against numbers found by hand."""

import math

import numpy as np
import pytest

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
    drops = class_drops('a', BEFORE, entries)
    np.testing.assert_allclose(drops[5], [0.4, 0.2, 0, 0])


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
