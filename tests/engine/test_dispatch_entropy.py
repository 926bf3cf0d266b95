"""The entropy of the clusters inside the experts, counted by hand."""

import math

import pytest
import torch
from mmengine.evaluator import Evaluator

from mmdet_moe.errors import ConfigError


def evaluate(pairs, **options):
    evaluator = Evaluator({'type': 'mmdet_moe.DispatchEntropy', **options})
    samples = [
        {'cluster': torch.tensor(k), 'gt_label': torch.tensor([1]), 'expert_ids': torch.tensor(e)}
        for k, e in pairs
    ]
    evaluator.process(samples[:2])
    evaluator.process(samples[2:])
    return evaluator.evaluate(len(samples))


def test_by_hand():
    # Expert 0 has clusters 0, 0, 1; expert 2 has cluster 3 alone.
    pairs = [(0, [0]), (3, [2]), (1, [0]), (0, [0])]
    h = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert evaluate(pairs)['moe/dispatch_entropy'] == pytest.approx(3 / 4 * h)


def test_extremes():
    alone = [(k, [k + 1]) for k in range(4)] * 5
    mixed = [(k, [e]) for k in range(4) for e in range(3)]
    assert evaluate(alone)['moe/dispatch_entropy'] == pytest.approx(0, abs=1e-12)
    assert evaluate(mixed)['moe/dispatch_entropy'] == pytest.approx(math.log(4))


def test_several_experts_per_sample():
    # Expert 0 has clusters 0, 1; expert 1 has cluster 0 alone.
    pairs = [(0, [0, 1]), (0, [1, 2]), (1, [0, 3])]
    assert evaluate(pairs)['moe/dispatch_entropy'] == pytest.approx(2 / 6 * math.log(2))


def test_other_labels():
    found = evaluate([(0, [0]), (1, [0]), (2, [1])], label='gt_label', prefix='classes')
    assert found == {'classes/dispatch_entropy': pytest.approx(0, abs=1e-12)}


def test_refused():
    with pytest.raises(ConfigError, match='needs data samples with `superclass`'):
        evaluate([(0, [0]), (1, [0])], label='superclass')
    with pytest.raises(ConfigError, match='`cluster` is -1, which is no number of a cluster'):
        evaluate([(0, [0]), (-1, [0])])
