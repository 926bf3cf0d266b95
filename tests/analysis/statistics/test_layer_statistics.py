"""Statistics of a layer's decisions against loops and numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
from scipy.stats import entropy

from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.statistics.layer_statistics import LayerStatistics


def statistics_of(weights, level=None, image=None, position=None, **kwargs):
    added = decisions(weights, level, image, position)
    statistics = LayerStatistics(added.weights.shape[1], **kwargs)
    statistics.add(added)
    return statistics


def decisions(weights, level=None, image=None, position=None, unit=None):
    weights = np.array(weights, dtype=np.float32)
    n = len(weights)
    return DecisionRecords(
        image=np.arange(n) if image is None else np.array(image),
        unit=np.arange(n) if unit is None else unit,
        level=np.zeros(n, dtype=int) if level is None else np.array(level),
        centre=np.full((n, 2), np.nan) if position is None else position,
        weights=weights,
    )


def test_numbers_worked_out():
    """Weights (3/4, 1/4, 0) and (0, 1/2, 1/2); mean (3/8, 3/8, 1/4)."""
    found = statistics_of([[0.75, 0.25, 0], [0, 0.5, 0.5]]).as_dict(permutations=9)
    decision = (entropy([0.75, 0.25]) + math.log(2)) / 2
    usage = entropy([0.375, 0.375, 0.25])
    assert found['num_experts'] == 3
    assert found['num_decisions'] == 2
    assert found['load'] == [0.25, 0.5, 0.25]
    assert found['importance'] == pytest.approx([0.375, 0.375, 0.25])
    assert found['load_cv2'] == pytest.approx(3 / 16)  # variance 1/48, mean 1/3
    assert found['decision_entropy'] == pytest.approx(decision)
    assert found['usage_entropy'] == pytest.approx(usage)
    assert found['mi_input'] == pytest.approx(usage - decision)
    assert found['dead_experts'] == []
    assert not found['collapsed']
    assert found['coactivation'] == [[0.5, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 0.5]]


def test_loops_agree_and_calls_add_up():
    rng = np.random.default_rng(0)
    n, experts = 60, 5
    weights = rng.random((n, experts)) * (rng.random((n, experts)) < 0.5)
    weights[np.arange(n), rng.integers(0, experts, n)] += 0.2
    weights = weights.astype(np.float32)
    level, image, position = rng.integers(0, 3, n), np.arange(n) // 3, rng.random((n, 2))
    together = statistics_of(weights, level, image, position)
    in_parts = LayerStatistics(experts)
    for part in np.array_split(np.arange(n), 7):
        in_parts.add(decisions(weights[part], level[part], image[part], position[part], part))
    found, parts = together.as_dict(19), in_parts.as_dict(19)

    rows = weights.astype(float).tolist()
    chosen = [[w > 0 for w in row] for row in rows]
    number = sum(map(sum, chosen))
    total = sum(map(sum, rows))
    usage = [sum(row[e] / sum(row) for row in rows) / n for e in range(experts)]
    decision = sum(entropy([w / sum(row) for w in row]) for row in rows) / n
    for content in (found, parts):
        for e in range(experts):
            assert content['load'][e] == pytest.approx(sum(row[e] for row in chosen) / number)
            assert content['importance'][e] == pytest.approx(sum(row[e] for row in rows) / total)
            for other in range(experts):
                both = sum(row[e] and row[other] for row in chosen)
                assert content['coactivation'][e][other] == pytest.approx(both / n)
        assert content['decision_entropy'] == pytest.approx(decision)
        assert content['mi_input'] == pytest.approx(entropy(usage) - decision)
        by_level = content['associations']['decisions']['level']
        assert by_level['bins'] == ['0', '1', '2']
        for b in range(3):
            expected = [
                sum(row[e] / sum(row) for row, at in zip(rows, level, strict=True) if at == b)
                for e in range(experts)
            ]
            assert by_level['counts'][b] == pytest.approx(expected)
        cells = content['associations']['decisions']['position']
        assert len(cells['bins']) == 9
        of_cell = [sum(row) for row in cells['counts']]
        expected = [
            sum(int(3 * x) == column and int(3 * y) == row for x, y in position)
            for row in range(3)
            for column in range(3)
        ]
        assert of_cell == pytest.approx(expected)
    assert json.dumps(found['associations']) == json.dumps(parts['associations'])


def test_collapse_is_seen():
    """Half and half looks balanced between two of four experts, but the input decides nothing."""
    found = statistics_of([[0.5, 0.5, 0, 0]] * 8).as_dict(9)
    assert found['collapsed']
    assert found['dead_experts'] == [2, 3]
    assert found['mi_input'] == pytest.approx(0, abs=1e-12)


def test_experts_of_levels():
    """Level decides: all of its entropy."""
    level = np.arange(40) % 2
    found = statistics_of(np.eye(2)[level], level, np.arange(40) // 2).as_dict(99)
    by = found['associations']['decisions']
    assert by.keys() == {'level'}
    assert by['level']['mi'] == pytest.approx(math.log(2))
    assert by['level']['p_value'] == 0.01
    assert (by['level']['num_units'], by['level']['num_images']) == (40, 20)


def test_position_given_the_level():
    """Left is expert 0 on one level and expert 1 on the other: nothing, but for the level."""
    rng = np.random.default_rng(0)
    level, left = np.tile([0, 1], 100), rng.random(200) < 0.5
    position = np.stack([np.where(left, 0.1, 0.9), np.full(200, 0.1)], axis=1)
    weights = np.eye(2)[left ^ level]
    found = statistics_of(weights, level, np.arange(200) // 2, position).as_dict(199)
    association = found['associations']['decisions']['position']
    assert association['mi'] < 0.02
    assert association['given']['level']['mi'] == pytest.approx(math.log(2), abs=0.02)
    assert association['given']['level']['p_adjusted'] == 0.005


def test_intervals_of_load_and_importance():
    """Those of the mean of images, by the normal distribution."""
    rng = np.random.default_rng(0)
    weights = np.eye(3)[rng.choice(3, 400, p=[0.2, 0.3, 0.5])]
    found = statistics_of(weights).as_dict(499)
    for name in ('load', 'importance'):
        for share, (low, high) in zip(found[name], found[f'{name}_interval'], strict=True):
            error = 1.96 * math.sqrt(share * (1 - share) / 400)
            assert (share - low, high - share) == pytest.approx((error, error), rel=0.2)


def test_what_all_images_agree_on_may_be_otherwise_in_others():
    """The rule of three: of 60 images all agree, so up to 3 / 60 of all others may not."""
    weights = np.zeros((60, 4))
    weights[:, 0] = 1  # always, next to one of two; the last one never
    weights[np.arange(60), 1 + np.arange(60) % 2] = 1
    found = statistics_of(weights).as_dict(99)
    first, second, _, last = found['load_interval']
    assert first == pytest.approx([0.5 - 0.025, 0.5 + 0.025])
    assert last == pytest.approx([0, 0.05])
    assert second[0] < 0.24 < 0.26 < second[1]  # of the bootstrap: 60 images, half of each
    # All of them, always: nothing is chosen.
    assert statistics_of(np.ones((60, 2))).as_dict(9)['load_interval'] == [[0.5, 0.5]] * 2


def test_one_level_is_nothing_to_compare_with():
    position = np.full((3, 2), np.nan)
    found = statistics_of(np.eye(3), position=position).as_dict(9)
    assert not found['associations']['decisions']


def test_decisions_without_weights_are_left_out():
    weights = [[1, 0], [0, 0], [np.nan, np.nan], [0, 1]]
    statistics = statistics_of(weights, level=[0, 7, 7, 1])
    found = statistics.as_dict(9)
    assert found['num_decisions'] == 2
    assert found['load'] == found['importance'] == [0.5, 0.5]
    assert found['associations']['decisions']['level']['bins'] == ['0', '1']
    assert found['associations']['decisions']['level']['counts'] == [[1, 0], [0, 1]]


@pytest.mark.parametrize('weights', [np.zeros((0, 3)), np.zeros((4, 3))])
def test_nothing_at_all(weights):
    found = statistics_of(weights).as_dict(9)
    assert found['num_decisions'] == 0
    assert found['load'] == [0, 0, 0]
    assert not found['collapsed']
    json.dumps(found, allow_nan=False)


def test_json_and_bounded_memory():
    rng = np.random.default_rng(1)
    statistics = LayerStatistics(3, max_entries=40)
    for start in range(0, 500, 50):
        weights = rng.dirichlet(np.ones(3), 50).astype(np.float32)
        statistics.add(decisions(weights, np.arange(50) % 4, np.arange(start, start + 50) // 2))
    found = statistics.as_dict(9)
    assert found['num_decisions'] == 500
    assert 36 <= found['associations']['decisions']['level']['num_units'] <= 40
    assert sum(map(sum, found['associations']['decisions']['level']['counts'])) == pytest.approx(
        500
    )
    json.dumps(found, allow_nan=False)


def test_refused():
    statistics = LayerStatistics(2)
    two = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match='same number'):
        statistics.add(decisions(two, image=[0, 0], unit=np.zeros(2, int)))
    with pytest.raises(ValueError, match='bin 40'):
        statistics.add(decisions(two, [0, 40], [0, 0]))
    assert statistics.report().num_items == 0
