"""Associations against numbers worked out by hand, loops, and simulated data."""

import itertools
import json
import math

import numpy as np
import pytest

from mmdet_moe.analysis.statistics.association import Association
from mmdet_moe.analysis.statistics.bins import (
    COCO_SIZES,
    POSITIONS,
    SIZES,
    Bins,
    coco_size_bin,
    position_bin,
    size_bin,
    size_bins,
)


def information(table):
    """By the definition, with loops."""
    total = sum(map(sum, table))
    mi = 0.0
    for row in table:
        for e, count in enumerate(row):
            if count > 0:
                column = sum(other[e] for other in table)
                mi += count / total * math.log(count * total / (sum(row) * column))
    return mi


def entropy(counts):
    return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c > 0)


def joint(entries, weights, num_bins):
    """Entries (decision, bin, count); weights of each decision."""
    table = [[0.0] * len(weights[0]) for _ in range(num_bins)]
    for unit, b, count in entries:
        for e, weight in enumerate(weights[unit]):
            table[b][e] += count * weight / sum(weights[unit])
    return table


def add(association, entries, weights):
    unit, bins, counts = (np.array(x) for x in zip(*entries, strict=True))
    association.add(unit, bins, counts, np.array(weights, dtype=np.float32)[unit])


def one_hot(experts, num_experts):
    return np.eye(num_experts, dtype=np.float32)[experts]


# Two objects of bin 0 on decision 0 (expert 0), one of bin 1 on decision 1 (half expert 0, half
# expert 1), and one of bin 1 spread over both.
ENTRIES = [(0, 0, 1.0), (0, 0, 1.0), (1, 1, 1.0), (0, 1, 0.5), (1, 1, 0.5)]
WEIGHTS = [[1.0, 0.0], [0.5, 0.5]]
# bin 0: 2 · (1, 0); bin 1: 1.5 · (0.5, 0.5) + 0.5 · (1, 0).
TABLE = [[2.0, 0.0], [1.25, 0.75]]


def test_numbers_worked_out():
    association = Association(2, 2)
    add(association, ENTRIES, WEIGHTS)
    result = association.result(permutations=99)
    np.testing.assert_allclose(association.table(), TABLE)
    np.testing.assert_allclose(result.counts, TABLE)
    np.testing.assert_allclose(result.bin_given_expert, [[2 / 3.25, 0], [1.25 / 3.25, 1]])
    np.testing.assert_allclose(result.expert_given_bin, [[1, 0], [0.625, 0.375]])
    # H(bin) + H(expert) - H(both), of the shares 0.5, 0.3125, 0.1875 and their sums.
    mi = math.log(2) + entropy([0.8125, 0.1875]) - entropy([0.5, 0.3125, 0.1875])
    assert result.mi == pytest.approx(mi)
    assert result.mi == pytest.approx(information(TABLE))
    assert result.mi_max == pytest.approx(entropy([0.8125, 0.1875]))  # below log 2 of the bins
    assert result.num_units == 2
    # The other order gives decision 0 the weights (0.5, 0.5): bin 0 (1, 1), bin 1 (1.75, 0.25).
    other = information([[1.0, 1.0], [1.75, 0.25]])
    assert other < mi
    as_observed = (result.p_value * 100 - 1) / 99
    assert result.chance == pytest.approx(as_observed * mi + (1 - as_observed) * other)


@pytest.mark.parametrize('batch', [3, 1000])
def test_loops_agree(batch):
    """Any entries, also several per decision and bin, in any number of calls."""
    rng = np.random.default_rng(0)
    num_units, num_bins, num_experts = 40, 5, 3
    weights = rng.random((num_units, num_experts)) * (rng.random((num_units, num_experts)) < 0.7)
    weights[:, 0] += 0.1
    weights = weights.astype(np.float32)
    entries = sorted(
        (int(rng.integers(num_units)), int(rng.integers(num_bins)), float(rng.random()))
        for _ in range(150)
    )
    association = Association(num_bins, num_experts)
    for start in range(0, num_units, batch):
        part = [entry for entry in entries if start <= entry[0] < start + batch]
        add(association, part, weights)
    result = association.result(permutations=19)
    table = joint(entries, weights.tolist(), num_bins)
    np.testing.assert_allclose(result.counts, table, rtol=1e-6)
    assert result.counts.sum() == pytest.approx(sum(count for _, _, count in entries))
    assert result.mi == pytest.approx(information(table), rel=1e-6)
    assert result.num_units == len({unit for unit, _, _ in entries})
    for b, e in itertools.product(range(num_bins), range(num_experts)):
        assert result.expert_given_bin[b, e] == pytest.approx(table[b][e] / sum(table[b]), rel=1e-6)
        column = sum(row[e] for row in table)
        assert result.bin_given_expert[b, e] == pytest.approx(table[b][e] / column, rel=1e-6)
    assert result.mi_max == pytest.approx(
        min(entropy([sum(row) for row in table]), entropy([sum(c) for c in zip(*table)])),  # noqa: B905
        rel=1e-6,
    )


def test_permutations_approach_all_orders():
    """Mean and p-value over all 5! orders of the weights, enumerated."""
    weights = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5], [0.0, 1.0]]
    entries = [(0, 0, 2.0), (1, 0, 1.0), (2, 1, 3.0), (3, 0, 1.0), (4, 1, 1.0), (1, 1, 0.5)]
    association = Association(2, 2)
    add(association, entries, weights)
    result = association.result(permutations=4000)
    all_orders = [
        information(joint(entries, [weights[i] for i in order], 2))
        for order in itertools.permutations(range(5))
    ]
    share = np.mean([mi >= result.mi - 1e-6 for mi in all_orders])
    # Five standard errors.
    assert result.p_value == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000))
    assert result.chance == pytest.approx(
        np.mean(all_orders), abs=5 * np.std(all_orders) / math.sqrt(4000)
    )


def test_p_values_are_uniform_under_independence():
    """Decisions with one to three things each, and weights that know nothing of them."""
    rng = np.random.default_rng(1)
    trials, p_values = 200, []
    for trial in range(trials):
        unit = np.repeat(np.arange(60), rng.integers(1, 4, 60))
        weights = rng.dirichlet(np.ones(3), 60).astype(np.float32)
        association = Association(4, 3)
        association.add(unit, rng.integers(0, 4, len(unit)), np.ones(len(unit)), weights[unit])
        p_values.append(association.result(permutations=99, seed=trial).p_value)
    for level in (0.1, 0.5):
        bound = 4 * math.sqrt(trials * level * (1 - level))
        assert abs(sum(p <= level for p in p_values) - trials * level) < bound
    assert min(p_values) >= 0.01


def test_clusters_do_not_cry_wolf():
    """30 objects of one class on each decision, experts chosen blindly.

    Permuting objects, as if they were independent, finds an association nearly always.
    """
    rng = np.random.default_rng(2)
    trials, by_decision, by_object = 60, 0, 0
    for trial in range(trials):
        decisions = np.repeat(np.arange(20), 30)
        classes = rng.integers(0, 3, 20)[decisions]
        weights = one_hot(rng.integers(0, 3, 20), 3)[decisions]
        for unit in (decisions, np.arange(600)):
            association = Association(3, 3)
            association.add(unit, classes, np.ones(600), weights)
            found = association.result(permutations=99, seed=trial).p_value <= 0.05
            if unit is decisions:
                by_decision += found
            else:
                by_object += found
    # 3 are expected of 60; 10 or more would have a probability of 0.0007.
    assert by_decision < 10
    assert by_object > 50


def test_strong_association_has_the_smallest_p_value():
    rng = np.random.default_rng(3)
    bins = rng.integers(0, 4, 200)
    association = Association(4, 4)
    association.add(np.arange(200), bins, np.ones(200), one_hot(bins, 4))
    result = association.result(permutations=199)
    assert result.p_value == 1 / 200
    assert result.mi == pytest.approx(entropy(np.bincount(bins).tolist()))
    assert result.mi == pytest.approx(result.mi_max)
    # For independent counts the plug-in estimate is about (B - 1)(E - 1) / 2U too high.
    assert result.chance == pytest.approx(9 / 400, rel=0.2)


def test_equal_weights_are_no_association():
    """All permutations give the same table: rounding must not make a p-value of it."""
    rng = np.random.default_rng(4)
    weights = np.tile(np.float32([0.3, 0.6, 0.1]), (50, 1))
    association = Association(5, 3)
    association.add(np.arange(50), rng.integers(0, 5, 50), rng.random(50), weights)
    result = association.result(permutations=99)
    assert result.p_value == 1
    assert result.mi == pytest.approx(0, abs=1e-12)


def test_discovered_bins():
    """As with the attribute `image`: any numbers; the same test, but no table."""
    rng = np.random.default_rng(5)
    image = rng.integers(0, 30, 200)
    weights = rng.dirichlet(np.ones(4), 30).astype(np.float32)[image]
    numbers = np.array([10**12 + 7 * i for i in range(30)])
    known, found = Association(30, 4), Association(None, 4)
    for part in np.array_split(np.arange(200), 3):
        known.add(part, image[part], np.ones(len(part)), weights[part])
        found.add(part, numbers[image[part]], np.ones(len(part)), weights[part])
    with_table, without = known.result(49), found.result(49)
    assert without.counts is None
    for name in ('mi', 'chance', 'p_value', 'num_units', 'mi_max'):
        assert getattr(without, name) == pytest.approx(getattr(with_table, name)), name
    assert without.p_value == 0.02
    with pytest.raises(ValueError, match='num_bins'):
        found.table()
    assert not {'bins', 'counts', 'bin_given_expert'} & without.as_dict().keys()


def test_reservoir_is_bounded_and_the_table_exact():
    rng = np.random.default_rng(6)
    association, expected = Association(3, 2, max_units=100), np.zeros((3, 2))
    for _ in range(50):
        unit = np.repeat(np.arange(20), 2)  # numbers need to be unique within a call only
        bins, weights = rng.integers(0, 3, 40), rng.dirichlet([1, 1], 20).astype(np.float32)[unit]
        association.add(unit, bins, np.ones(40), weights)
        assert association.num_kept <= 125
        for b, row in zip(bins, weights, strict=True):
            expected[b] += row.astype(float) / row.astype(float).sum()
    result = association.result(permutations=9)
    assert (association.num_units, association.num_kept, result.num_units) == (1000, 100, 100)
    np.testing.assert_allclose(association.table(), expected)
    assert result.counts.sum() == pytest.approx(2000)


def test_sample_is_uniform():
    """Every decision has the same chance, early or late; each has a bin of its own here."""
    seen = np.zeros(60)
    for seed in range(400):
        association = Association(None, 1, max_units=15, seed=seed)
        for start in range(0, 60, 6):
            units = np.arange(start, start + 6)
            association.add(units, units, np.ones(6), np.ones((6, 1)))
        association.result(1)
        kept = np.concatenate([part.bins for part in association._kept])
        assert len(kept) == 15
        seen[kept] += 1
    # Binomial (400, 1/4): mean 100, standard deviation 8.7.
    assert abs(seen - 100).max() < 4.5 * 8.7
    # And no trend: the mean of ten has a deviation of at most 2.8.
    assert abs(seen.reshape(6, 10).mean(1) - 100).max() < 4 * 2.8


def test_same_sample_however_it_is_divided():
    rng = np.random.default_rng(7)
    bins, weights = rng.integers(0, 4, 300), rng.dirichlet(np.ones(3), 300).astype(np.float32)
    results = []
    for parts in (1, 30):
        association = Association(4, 3, max_units=50)
        for part in np.array_split(np.arange(300)[::-1], parts):
            association.add(part, bins[part], np.ones(len(part)), weights[part])
        results.append(association.result(19, seed=3))
    assert results[0].mi == results[1].mi
    assert results[0].p_value == results[1].p_value
    np.testing.assert_allclose(results[0].counts, results[1].counts)


def test_what_does_not_take_part():
    """Without bin, without count, without weights; then nothing of the decision is left."""
    association = Association(2, 2)
    association.add(
        [0, 0, 1, 2, 3, 4],
        [0, -1, -1, 1, 1, 1],
        [1, 5, 1, 0, 1, 1],
        [[0.5, 1.5], [0.5, 1.5], [1, 0], [1, 0], [0, 0], [np.nan, 1]],
    )
    assert association.num_units == 1
    np.testing.assert_allclose(association.table(), [[0.25, 0.75], [0, 0]])
    result = association.result(9)
    assert (result.mi, result.p_value, result.mi_max) == (0, 1, 0)
    np.testing.assert_allclose(result.expert_given_bin, [[0.25, 0.75], [0, 0]])


@pytest.mark.parametrize('num_bins', [3, None])
def test_nothing_at_all(num_bins):
    association = Association(num_bins, 2)
    association.add([], [], [], np.zeros((0, 2)))
    result = association.result(99)
    assert (result.mi, result.chance, result.p_value, result.num_units) == (0, 0, 1, 0)
    text = json.dumps(result.as_dict(num_bins and COCO_SIZES), allow_nan=False)
    assert json.loads(text)['mi_max'] == 0


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        (([0], [2], [1.0], [[1, 0]]), 'bin 2 of 2'),
        (([0], [0], [-1.0], [[1, 0]]), 'counts'),
        (([0], [0], [math.nan], [[1, 0]]), 'counts'),
        (([0], [0], [1.0], [[1, -1]]), 'weights must not be negative'),
        (([0], [0], [1.0], [[1, 0, 0]]), r'must be \(1, 2\)'),
        (([0, 1], [0], [1.0], [[1, 0]]), r'must be \(n,\)'),
        (([0, 0], [0, 1], [1.0, 1.0], [[1, 0], [0, 1]]), 'different weights'),
    ],
)
def test_refused(entries, message):
    association = Association(2, 2)
    with pytest.raises(ValueError, match=message):
        association.add(*entries)
    assert association.table().sum() == association.num_units == 0


def test_as_dict_is_the_contract():
    association = Association(3, 2)
    association.add([0, 1], [0, 2], [1, 1], [[1, 0], [0, 1]])
    bins = Bins(['a', 'b', 'c'], [1.0, 2.0, 3.0, 4.0], 'px')
    content = json.loads(json.dumps(association.result(9).as_dict(bins), allow_nan=False))
    assert content['bins'] == ['a', 'b', 'c']
    assert content['edges'] == [1, 2, 3, 4]
    assert content['unit'] == 'px'
    assert content['counts'] == [[1, 0], [0, 0], [0, 1]]
    assert content['bin_given_expert'] == [[1, 0], [0, 0], [0, 1]]
    assert content['expert_given_bin'] == [[1, 0], [0, 0], [0, 1]]
    assert content['mi'] == pytest.approx(math.log(2))
    assert content['permutations'] == 9
    with pytest.raises(ValueError, match='9 bins are named, but there is a table of 3'):
        association.result(9).as_dict(POSITIONS)


def test_sizes():
    assert SIZES.names[:3] == ['<8', '8-11', '11-16']
    assert SIZES.names[-2:] == ['362-512', '>=512']
    assert len(SIZES) == 14
    assert len(SIZES.edges) == 15
    assert SIZES.unit == 'px'
    assert SIZES.edges[1] == 8
    assert SIZES.edges[-2] == 512
    np.testing.assert_allclose(np.diff(np.log2(SIZES.edges)), 0.5)
    sizes = np.float32([0, 7.99, 8, 11.3, 11.4, 32, 31.99, 511, 512, 4000, np.nan])
    names = [None if b < 0 else SIZES.names[b] for b in size_bin(sizes)]
    assert names == [
        *('<8', '<8', '8-11', '8-11', '11-16', '32-45', '23-32', '362-512', '>=512', '>=512', None)
    ]
    assert size_bins(16, 40).names == ['<16', '16-23', '23-32', '32-45', '>=45']


def test_coco_sizes():
    sizes = np.array([31.9, 32, 95.9, 96, np.nan])
    names = [None if b < 0 else COCO_SIZES.names[b] for b in coco_size_bin(sizes)]
    assert names == ['small', 'medium', 'medium', 'large', None]


def test_positions():
    x = np.float32([0, 0.5, 1, 0.3, 0.34, 1.2, -0.1, np.nan])
    y = np.float32([0, 0.5, 1, 0.9, 0.1, 0.5, 0.5, 0.5])
    names = [None if b < 0 else POSITIONS.names[b] for b in position_bin(x, y)]
    assert names == [
        *('top left', 'middle centre', 'bottom right', 'bottom left', 'top centre'),
        *('middle right', 'middle left', None),
    ]


def test_bins_check_themselves():
    with pytest.raises(ValueError, match='same name'):
        Bins(['a', 'a'])
    with pytest.raises(ValueError, match='2 bins cannot have 2 edges'):
        Bins(['a', 'b'], [0.0, 1.0])
    with pytest.raises(ValueError, match='without edges'):
        COCO_SIZES.find(np.zeros(1))
    with pytest.raises(ValueError, match='low=8'):
        size_bins(8, 8)
