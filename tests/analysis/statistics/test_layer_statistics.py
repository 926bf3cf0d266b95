"""Statistics of a layer's decisions against loops and numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from mmdet_moe.analysis.records.contents import DecisionRecords
from mmdet_moe.analysis.statistics.layer_statistics import LayerStatistics


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


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
    images = (content['associations']['decisions']['image'] for content in (found, parts))
    assert len({json.dumps(content) for content in images}) == 1


def test_collapse_is_seen():
    """Half and half looks balanced between two of four experts, but the input decides nothing."""
    found = statistics_of([[0.5, 0.5, 0, 0]] * 8).as_dict(9)
    assert found['collapsed']
    assert found['dead_experts'] == [2, 3]
    assert found['mi_input'] == pytest.approx(0, abs=1e-12)
    # One decision for each image: there is nothing that its other decisions could agree with.
    assert 'image' not in found['associations']['decisions']


def test_experts_of_levels_and_images():
    """Level decides: all of its entropy; each image has both levels, so it says nothing."""
    level = np.arange(40) % 2
    found = statistics_of(np.eye(2)[level], level, np.arange(40) // 2).as_dict(99)
    by = found['associations']['decisions']
    assert by.keys() == {'image', 'level'}
    assert by['level']['mi'] == pytest.approx(math.log(2))
    assert by['level']['p_value'] == 0.01
    assert by['image']['mi'] == pytest.approx(0, abs=1e-12)
    assert by['image']['p_value'] == 1
    assert 'counts' not in by['image']


def test_what_an_image_adds_is_seen_within_the_levels():
    """Images are compared with others of the same level, however much the levels differ."""
    rng = np.random.default_rng(0)
    level, image = np.tile([0, 1], 60), np.repeat(np.arange(60), 2)
    # Half of each decision is for the level's own expert, 2 or 3, half for expert 0 or 1.
    for agree in (True, False):
        own = rng.integers(0, 2, 60)[image] if agree else rng.integers(0, 2, 120)
        weights = (np.eye(4)[own] + np.eye(4)[2 + level]) / 2
        found = statistics_of(weights, level, image).as_dict(199)
        association = found['associations']['decisions']['image']
        if agree:
            assert association['p_value'] == 0.005
        else:
            assert association['p_value'] > 0.05


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
    statistics = LayerStatistics(3, max_units=40)
    for start in range(0, 500, 50):
        weights = rng.dirichlet(np.ones(3), 50).astype(np.float32)
        statistics.add(
            decisions(weights, rng.integers(0, 4, 50), np.arange(start, start + 50) // 2)
        )
    found = statistics.as_dict(9)
    assert found['num_decisions'] == 500
    assert found['associations']['decisions']['image']['num_units'] == 40
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
