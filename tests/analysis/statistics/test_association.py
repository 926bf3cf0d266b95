"""Associations against numbers worked out by hand, loops, and simulated data."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import entropy, hypergeom
from sklearn.metrics import mutual_info_score
from synthetic import information_of

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
from mmdet_moe.analysis.statistics.inference import adjusted, resampled_images


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
    found = result.information
    np.testing.assert_allclose(association.table(), TABLE)
    np.testing.assert_allclose(result.counts, TABLE)
    np.testing.assert_allclose(result.bin_given_expert, [[2 / 3.25, 0], [1.25 / 3.25, 1]])
    np.testing.assert_allclose(result.expert_given_bin, [[1, 0], [0.625, 0.375]])
    # H(bin) + H(expert) - H(both), of the shares 0.5, 0.3125, 0.1875 and their sums.
    mi = math.log(2) + entropy([0.8125, 0.1875]) - entropy([0.5, 0.3125, 0.1875])
    assert found.mi == pytest.approx(mi)
    assert found.mi == pytest.approx(information_of(TABLE))
    assert found.mi_max == pytest.approx(entropy([0.8125, 0.1875]))  # below log 2 of the bins
    assert (found.num_units, found.num_images) == (2, 2)
    assert result.given == {}


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
    found = result.information
    table = joint(entries, weights.tolist(), num_bins)
    np.testing.assert_allclose(result.counts, table, rtol=1e-6)
    assert result.counts.sum() == pytest.approx(sum(count for _, _, count in entries))
    assert found.mi == pytest.approx(information_of(table), rel=1e-6)
    assert found.num_units == len({unit for unit, _, _ in entries})
    for b, e in itertools.product(range(num_bins), range(num_experts)):
        assert result.expert_given_bin[b, e] == pytest.approx(table[b][e] / sum(table[b]), rel=1e-6)
        column = sum(row[e] for row in table)
        assert result.bin_given_expert[b, e] == pytest.approx(table[b][e] / column, rel=1e-6)
    assert found.mi_max == pytest.approx(
        min(entropy([sum(row) for row in table]), entropy([sum(c) for c in zip(*table)])),  # noqa: B905
        rel=1e-6,
    )


def test_flips_approach_all_signs():
    """p-values of table and cells over all 2^5 signs of the images, enumerated with loops."""
    weights = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5], [0.0, 1.0], [0.6, 0.4]]
    entries = [(0, 0, 2.0), (1, 0, 1.0), (2, 1, 3.0), (3, 0, 1.0), (4, 1, 1.0), (5, 1, 0.5)]
    image = np.array([0, 1, 2, 3, 4, 1])  # decisions 1 and 5 are of one
    units, bins, counts = (np.array(x) for x in zip(*entries, strict=True))
    association = Association(2, 2)
    association.add(units, bins, counts, np.array(weights)[units], image)
    result = association.result(permutations=4000)
    table = np.array(joint(entries, weights, 2))
    mean, of_bin = table.sum(0) / table.sum(), table.sum(1)
    excess = np.zeros((5, 2, 2))
    for unit, b, count in entries:
        excess[image[unit], b] += count * (np.array(weights[unit]) - mean)

    def statistic(signs, of_images):
        flipped = sum(sign * one for sign, one in zip(signs, of_images, strict=True))
        flipped = flipped - np.outer(of_bin / of_bin.sum(), flipped.sum(0))
        return flipped, (flipped**2 / np.outer(of_bin, mean)).sum() / (2 * of_bin.sum())

    seen, observed = statistic([1] * 5, excess)
    # The things of each image, of 8.5: what is flipped is larger by its share.
    grown = excess / np.sqrt(1 - np.array([2, 1.5, 3, 1, 1]) / 8.5)[:, None, None]
    every = [statistic(signs, grown) for signs in itertools.product([1, -1], repeat=5)]
    share = np.mean([value >= observed - 1e-6 for _, value in every])
    # Five standard errors.
    assert result.information.p_value == pytest.approx(
        share, abs=5 * math.sqrt(share * (1 - share) / 4000) + 1e-3
    )
    of_cells = np.mean([np.abs(flipped) >= np.abs(seen) - 1e-6 for flipped, _ in every], axis=0)
    # Cells with less than expected have few flips to tell by: there a p-value may be larger.
    more = table >= np.outer(of_bin, mean)
    np.testing.assert_allclose(result.cells.p[more], of_cells[more], atol=0.04)
    assert (result.cells.p >= of_cells - 0.04).all()
    # To second order the mutual information itself.
    assert observed == pytest.approx(information_of(table.tolist()), rel=0.2)


def simulate(rng, num_images, alike, attribute, num_experts=4):
    """Images of 64 patches on 4 levels, a share of them with the choice of their image.

    Returns:
        What `Association.add` takes: of ``'class'``, one for each image; ``'size'``, of one to
        eight objects, which the image sways; ``'position'``, of every patch; and ``'by level'``,
        sizes that go by the level, as choices then do.
    """
    image, level = np.repeat(np.arange(num_images), 64), np.tile(np.arange(64) // 16, num_images)
    own = rng.integers(0, num_experts, num_images)[image]
    drawn = rng.integers(0, num_experts, len(image))
    experts = np.where(rng.random(len(image)) < alike, own, drawn)
    unit = np.arange(len(image))
    if attribute == 'class':
        bins = rng.integers(0, 5, num_images)[image]
    elif attribute == 'position':
        bins = unit % 5
    else:
        objects = np.repeat(np.arange(num_images), rng.integers(1, 9, num_images))
        unit = 64 * objects + rng.integers(0, 64, len(objects))
        swayed = rng.integers(0, 3, num_images)[objects]
        if attribute == 'by level':
            swayed = level[unit] // 2
            experts = np.where(rng.random(len(image)) < 0.5, level, experts)
        bins = swayed + rng.integers(0, 3, len(objects))
    return (
        unit,
        bins,
        np.ones(len(unit)),
        one_hot(experts[unit], num_experts),
        image[unit],
        level[unit],
    )


@pytest.mark.parametrize('alike', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('attribute', ['class', 'size', 'position', 'by level'])
@pytest.mark.sweep(keep=0.3)
def test_nothing_is_found_in_noise(alike, attribute, request):
    """100 images of 64 patches: p < 0.01 in at most 2 % of 200 runs, also given the level."""
    is_whole = request.config.getoption('--all')
    trials, p_values = 200 if is_whole else 40, []
    for trial in range(trials):
        rng = np.random.default_rng([trial, len(attribute)])
        association = Association(5, 4, ('level',))
        *entries, level = simulate(rng, 100, alike, attribute)
        association.add(*entries, {'level': level})
        result = association.result(permutations=499 if is_whole else 199, seed=trial)
        p_values.append([test.p_value for test in result.tests])
    p_values = np.array(p_values)
    if attribute == 'by level':  # the level is an association of its own, but not given it
        assert (p_values[:, 0] < 0.01).mean() > 0.9
        p_values = p_values[:, 1:]
    # Of 40 as well: 3 or more of binomial (40, 0.01) have a probability of 0.008.
    assert (p_values < 0.01).mean(0).max() <= (0.02 if is_whole else 0.05)
    assert (p_values > 0.5).mean(0).min() > 0.25


@pytest.mark.parametrize('num_things', [1, 5])
def test_empty_cells_are_no_finding_by_themselves(num_things):
    """Choices from nothing, of experts of which some are rare; one image may have several things.

    By flips alone every empty cell had the smallest p-value: up to an eighth of all cells here.
    """
    load, significant, trials = [0.4, 0.3, 0.15, 0.09, 0.03, 0.01, 0.01, 0.01], [], 10
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        bins, experts = rng.integers(0, 10, 400), rng.choice(8, 400, p=load)
        image = np.arange(400).repeat(num_things)
        association = Association(10, 8)
        association.add(image, bins[image], np.ones(len(image)), one_hot(experts[image], 8), image)
        result = association.result(199, seed=trial)
        counts, p = result.counts / num_things, result.cells.p
        below = counts < np.outer(counts.sum(1), counts.sum(0)) / 400
        significant.append((p <= 0.05) & below)
        # Images are drawn without replacement: from those of all bins, those of the expert.
        drawn = hypergeom(400, counts.sum(0)[None], counts.sum(1)[:, None])
        assert (p >= np.where(below, drawn.cdf(counts), 0)).all()
    assert 0 < np.mean(significant) <= 0.025


def test_an_expert_that_avoids_a_bin_is_found():
    rng = np.random.default_rng(0)
    bins, experts = rng.integers(0, 4, 400), rng.integers(0, 4, 400)
    experts[(bins == 1) & (experts == 2)] = 3
    association = Association(4, 4)
    association.add(np.arange(400), bins, np.ones(400), one_hot(experts, 4))
    found = association.result(199)
    assert found.counts[1, 2] == 0
    assert found.cells.p[1, 2] == 1 / 200


def long_tailed(rng, num_images, num_classes, by=None):
    """Images of one to three classes, of which most are rare; sizes that go by class and image.

    Returns:
        Images, classes, sizes and experts of the objects: one of four experts for each image, drawn
        from nothing, or the one of the object's size (``by='size'``).
    """
    often = 1 / np.arange(1, num_classes + 1)
    image, label = [], []
    for i in range(num_images):
        for c in rng.choice(num_classes, rng.integers(1, 4), False, often / often.sum()):
            count = rng.geometric(1 / 3)
            image += [i] * count
            label += [c] * count
    image, label = np.array(image), np.array(label)
    of_image = rng.normal(0, 2, num_images)[image] + rng.normal(0, 1, len(image))
    size = np.round(5 + label * 7 % 5 + of_image).clip(0, 13).astype(int)
    drawn = rng.integers(0, 4, num_images)[image]
    return (
        image,
        label,
        size,
        np.where(rng.random(len(image)) < 0.5, size % 4, drawn) if by else drawn,
    )


def given_class(image, label, size, experts, **kwargs):
    association = Association(14, 4, ('class',))
    units = np.arange(len(image))
    association.add(units, size, np.ones(len(image)), one_hot(experts, 4), image, {'class': label})
    return association.result(199, **kwargs).given['class']


@pytest.mark.parametrize('num_classes', [20, 80])
def test_nothing_is_found_within_rare_classes(num_classes):
    """Classes of one to three images, in which all objects have the image's size and expert."""
    found = [
        given_class(*long_tailed(np.random.default_rng([trial, 3]), 100, num_classes), seed=trial)
        for trial in range(20)
    ]
    p = np.array([one.p_value for one in found])
    assert (p <= 0.05).sum() <= 4  # of binomial (20, 0.05), more have a probability of 0.003
    assert (p > 0.5).sum() >= 4
    assert sum(one.interval[0] > 0 for one in found) <= 4
    assert all(0 < one.left_out < 1 for one in found)


def test_what_there_is_within_rare_classes_is_found():
    for trial in range(6):
        made = long_tailed(np.random.default_rng([trial, 4]), 100, 80, by='size')
        assert given_class(*made).p_value == 1 / 200


def test_strata_of_too_few_images_are_left_out():
    """A level on four images, and one of which one image has nearly everything."""
    rng = np.random.default_rng(0)
    image = np.concatenate([np.arange(30).repeat(4), np.arange(4).repeat(5), [0] * 40, range(1, 9)])
    level = np.repeat([0, 1, 2], [120, 20, 48])
    bins, weights = rng.integers(0, 3, len(image)), one_hot(rng.integers(0, 2, len(image)), 2)

    def given(kept):
        association = Association(3, 2, ('level',))
        parts = bins[kept], np.ones(kept.sum()), weights[kept], image[kept]
        association.add(np.arange(kept.sum()), *parts, {'level': level[kept]})
        return association.result(99)

    found = given(level >= 0).given['level']
    alone = given(level == 0).information
    assert found.left_out == pytest.approx(68 / 188)
    assert (found.mi, found.mi_max, found.p_value) == (alone.mi, alone.mi_max, alone.p_value)
    assert (found.num_images, found.interval) == (30, alone.interval)
    assert alone.left_out == 0
    nothing = given(level > 0).given['level']
    assert (nothing.left_out, nothing.num_images, nothing.p_value) == (1, 0, 1)
    assert nothing.interval == (0, pytest.approx(math.log(2)))


def test_exchanging_decisions_would_cry_wolf():
    """Patches of an image that choose alike: each an image of its own, noise is significant."""
    found = 0
    for trial in range(10):
        unit, bins, ones, weights, *_ = simulate(np.random.default_rng(trial), 100, 1.0, 'class')
        association = Association(5, 4)
        association.add(unit, bins, ones, weights)
        found += association.result(permutations=99).information.p_value == 0.01
    assert found == 10


def test_effects_are_found_where_they_are():
    """By size and only within the levels; and by level alone, from which size seems to follow."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(150), 4)
    level, small = np.tile(np.arange(4), 150), rng.random(600) < 0.5
    experts = {'within': (small + level) % 2, 'level': level % 2}
    sizes = {
        'within': small.astype(int),
        'level': np.where(rng.random(600) < 0.8, level % 2, small),
    }
    found = {}
    for name, chosen in experts.items():
        association = Association(2, 2, ('level',))
        association.add(
            np.arange(600), sizes[name], np.ones(600), one_hot(chosen, 2), image, {'level': level}
        )
        found[name] = association.result(199)
    within, by_level = found['within'], found['level']
    assert within.information.p_value > 0.05
    assert within.given['level'].p_value == 1 / 200
    assert within.given['level'].mi == pytest.approx(math.log(2), abs=0.01)
    assert by_level.information.p_value == 1 / 200
    assert by_level.given['level'].mi == pytest.approx(0, abs=1e-12)
    assert by_level.given['level'].p_value == 1


@pytest.mark.parametrize('seed', range(3))
def test_information_given_the_level_by_scikit_learn(seed):
    """Hard assignments; the mean over the levels of what scikit-learn finds in each."""
    rng = np.random.default_rng(seed)
    bins, experts, level = (rng.integers(0, n, 400) for n in (5, 3, 4))
    experts = np.where(rng.random(400) < 0.3, (bins + level) % 3, experts)
    association = Association(5, 3, ('level',))
    entries = bins, np.ones(400), one_hot(experts, 3), np.arange(400) // 4
    association.add(np.arange(400), *entries, {'level': level})
    result = association.result(19)
    expected = sum(
        (level == number).mean()
        * mutual_info_score(bins[level == number], experts[level == number])
        for number in range(4)
    )
    assert result.given['level'].mi == pytest.approx(expected, rel=1e-9)
    assert result.information.mi == pytest.approx(mutual_info_score(bins, experts), rel=1e-9)
    of_bins, of_experts = (
        sum(
            (level == n).mean() * entropy(np.bincount(values[level == n]).tolist())
            for n in range(4)
        )
        for values in (bins, experts)
    )
    assert result.given['level'].mi_max == pytest.approx(min(of_bins, of_experts))


@pytest.mark.parametrize(
    ('effect', 'alike', 'least'), [(0.0, 0.7, 0.9), (0.1, 0.0, 0.9), (0.4, 0.7, 0.88)]
)
@pytest.mark.sweep(keep=0.34)
def test_intervals_cover(effect, alike, least):
    """The information of the distribution, which the plug-in estimate is above of."""
    table = np.full((5, 4), (1 - effect) / 4)
    table[np.arange(5), np.arange(5) % 4] += effect
    truth, trials, covered = information_of(table.tolist()), 60, 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 7])
        association = Association(5, 4)
        image = np.repeat(np.arange(80), 4)
        bins, own = rng.integers(0, 5, 320), rng.integers(0, 4, 80)[image]
        experts = np.where(rng.random(320) < alike, own, rng.integers(0, 4, 320))
        experts = np.where(rng.random(320) < effect, bins % 4, experts)
        association.add(np.arange(320), bins, np.ones(320), one_hot(experts, 4), image)
        low, high = association.result(199, seed=trial).information.interval
        covered += low <= truth <= high
    assert covered >= trials * least - 3


def test_intervals_of_shares_are_those_of_repeated_images():
    """Against a loop that repeats the entries of each image."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.arange(30), 5)
    bins, experts = rng.integers(0, 3, 150), rng.integers(0, 2, 150)
    association = Association(3, 2)
    association.add(np.arange(150), bins, np.ones(150), one_hot(experts, 2), image)
    found = association.result(99).cells.expert_given_bin
    shares = []
    for drawn in resampled_images(30, 99).T:
        table = np.zeros((3, 2))
        for i, times in enumerate(drawn):
            np.add.at(table, (bins[image == i], experts[image == i]), times)
        shares.append(table / table.sum(1, keepdims=True))
    np.testing.assert_allclose(found, np.quantile(shares, [0.025, 0.975], axis=0))


@pytest.mark.parametrize(('alike', 'low', 'high'), [
    (1, 0, 1), (4, 0, 1), (5, 1 - 3 / 5, 1), (12, 1 - 3 / 12, 1),
])  # fmt: skip
def test_shares_of_a_bin_on_few_images(alike, low, high):
    """All is possible of fewer than five; of n that agree, 3 / n others may exist."""
    rng = np.random.default_rng(0)
    bins = (np.arange(100) < alike).astype(np.int64)
    experts = np.where(bins, 1, rng.integers(0, 2, 100))
    association = Association(2, 2)
    for image in range(100):
        unit, one = np.array([image << 28]), np.ones(1)
        association.add(unit, bins[[image]], one, one_hot(experts[[image]], 2))
    cells = association.result(199).cells
    np.testing.assert_allclose(cells.expert_given_bin[:, 1, 1], [low, high])
    np.testing.assert_allclose(cells.expert_given_bin[:, 1, 0], [1 - high, 1 - low])
    common = cells.expert_given_bin[:, 0]
    assert (common[1] - common[0] < 0.3).all()
    # Expert 0 never sees bin 1: 3 / n of its images may.
    seen = (experts == 0).sum()
    np.testing.assert_allclose(cells.bin_given_expert[:, 1, 0], [0, 3 / seen], atol=1e-12)


def test_what_all_experts_have_alike_is_no_choice():
    """Every image has every bin, and its expert sees them all: nobody could have more."""
    association = Association(3, 2)
    for image in range(20):
        bins = np.arange(3)
        weights = one_hot(np.full(3, image % 2), 2)
        association.add(np.full(3, image << 28), bins, np.ones(3), weights)
    cells = association.result(99).cells
    np.testing.assert_allclose(cells.bin_given_expert, 1 / 3)


def test_a_family_is_corrected_by_its_largest_statistics():
    """At most as often as its level is any of 12 tests of nothing significant, unlike alone."""
    alone, together, trials = 0, 0, 20
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        tests = []
        for _ in range(12):
            association = Association(3, 3)
            weights = one_hot(rng.integers(0, 3, 60), 3)
            association.add(np.arange(60), rng.integers(0, 3, 60), np.ones(60), weights)
            tests += association.result(99, seed=trial).tests
        corrected = adjusted(tests)
        assert all(c >= t.p_value for c, t in zip(corrected, tests, strict=True))
        alone += min(test.p_value for test in tests) <= 0.1
        together += min(corrected) <= 0.1
    assert alone >= 10
    assert together <= 6  # 2 are expected; more than 6 have a probability of 0.002
    assert adjusted([]) == []


def test_images_have_the_same_signs_in_all_tests():
    """However many other images there are: the test of some is a part of that of more."""
    rng = np.random.default_rng(0)
    bins, weights = rng.integers(0, 3, 40), rng.dirichlet(np.ones(3), 40)
    results = []
    for image in (np.arange(40), np.arange(40) + 60):
        association = Association(3, 3)
        for part in np.array_split(np.arange(40), 3):
            ones = np.ones(len(part))
            association.add(part, bins[part], ones, weights[part], image[part])
        results.append(association.result(99).information)
    assert results[0].mi == results[1].mi
    assert not np.array_equal(results[0].flipped, results[1].flipped)
    association = Association(3, 3)
    association.add(
        np.arange(40)[::-1], bins[::-1], np.ones(40), weights[::-1], np.arange(40)[::-1]
    )
    np.testing.assert_allclose(association.result(99).information.flipped, results[0].flipped)


def test_strong_association_has_the_smallest_p_value():
    rng = np.random.default_rng(3)
    bins = rng.integers(0, 4, 200)
    association = Association(4, 4)
    association.add(np.arange(200), bins, np.ones(200), one_hot(bins, 4))
    result = association.result(permutations=199)
    found = result.information
    assert found.p_value == 1 / 200
    assert found.mi == pytest.approx(entropy(np.bincount(bins).tolist()))
    assert found.mi == pytest.approx(found.mi_max)
    # For independent counts the plug-in estimate is about (B - 1)(E - 1) / 2U too high.
    assert found.chance == pytest.approx(9 / 400, rel=0.2)
    assert (result.cells.p == 1 / 200).all()


def test_equal_weights_are_no_association():
    """All flips give the same table: rounding must not make a p-value of it."""
    rng = np.random.default_rng(4)
    weights = np.tile(np.float32([0.3, 0.6, 0.1]), (50, 1))
    association = Association(5, 3)
    association.add(np.arange(50), rng.integers(0, 5, 50), rng.random(50), weights)
    found = association.result(permutations=99).information
    assert found.p_value == 1
    assert found.mi == pytest.approx(0, abs=1e-12)
    assert (found.strength, found.interval) == (0, pytest.approx((0, 0), abs=1e-9))


def test_chance_of_tables_with_few_things():
    """Mean plug-in estimate of noise with about one thing in a cell: above (B - 1)(E - 1) / 2U."""
    estimates, chances = [], []
    for trial in range(30):
        rng = np.random.default_rng(trial)
        association = Association(30, 4)
        weights = one_hot(rng.integers(0, 4, 120), 4)
        association.add(np.arange(120), rng.integers(0, 30, 120), np.ones(120), weights)
        found = association.result(49).information
        estimates.append(found.mi)
        chances.append(found.chance)
    assert np.mean(estimates) > 1.15 * 29 * 3 / 240
    assert np.mean(chances) == pytest.approx(np.mean(estimates), rel=0.1)


def test_sample_is_bounded_and_the_table_exact():
    rng = np.random.default_rng(6)
    association, expected = Association(3, 2, max_entries=100), np.zeros((3, 2))
    for start in range(0, 1000, 20):
        unit = np.repeat(np.arange(20), 2)  # numbers need to be unique within a call only
        bins, weights = rng.integers(0, 3, 40), rng.dirichlet([1, 1], 20).astype(np.float32)[unit]
        association.add(unit, bins, np.ones(40), weights, start + unit // 2)
        assert association.num_kept <= 125
        for b, row in zip(bins, weights, strict=True):
            expected[b] += row.astype(float) / row.astype(float).sum()
    result = association.result(permutations=9)
    assert association.num_units == 1000
    assert 95 < association.num_kept <= 100
    assert result.information.num_images * 2 == result.information.num_units  # whole images
    np.testing.assert_allclose(association.table(), expected)
    assert result.counts.sum() == pytest.approx(2000)


def test_sample_is_uniform():
    """Every image has the same chance, early or late; each has a bin of its own here."""
    seen = np.zeros(60)
    for seed in range(400):
        association = Association(60, 1, max_entries=15, seed=seed)
        for start in range(0, 60, 6):
            units = np.arange(start, start + 6)
            association.add(units, units, np.ones(6), np.ones((6, 1)))
        association._shrink()
        kept = np.concatenate([part.cells[:, 0] for part in association._kept])
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
        association = Association(4, 3, max_entries=50)
        for part in np.array_split(np.arange(300)[::-1], parts):
            association.add(part, bins[part], np.ones(len(part)), weights[part], part // 2)
        results.append(association.result(19, seed=3))
    one, other = (result.information for result in results)
    assert (one.mi, one.p_value, one.interval) == (other.mi, other.p_value, other.interval)
    np.testing.assert_allclose(results[0].counts, results[1].counts)


def test_one_image_may_be_more_than_there_is_room_for():
    association = Association(40, 2, max_entries=10)
    for image in range(3):
        weights = np.tile([0.5, 0.5], (40, 1))
        association.add(np.arange(40), np.arange(40), np.ones(40), weights, np.full(40, image))
    assert association.result(9).information.num_images == 1


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
    found = result.information
    assert (found.mi, found.p_value, found.mi_max) == (0, 1, 0)
    np.testing.assert_allclose(result.expert_given_bin, [[0.25, 0.75], [0, 0]])


def test_nothing_at_all():
    association = Association(3, 2, ('level',))
    association.add([], [], [], np.zeros((0, 2)), given={'level': []})
    result = association.result(99)
    found = result.information
    assert (found.mi, found.chance, found.p_value, found.num_units) == (0, 0, 1, 0)
    text = json.dumps(result.as_dict(COCO_SIZES), allow_nan=False)
    assert json.loads(text)['mi_max'] == 0


def test_few_images_have_no_interval():
    association = Association(2, 2)
    association.add([0, 1, 2], [0, 1, 1], [1, 1, 1], [[1, 0], [0, 1], [0, 1]])
    result = association.result(9)
    assert result.information.interval == (0, result.information.mi_max)
    assert result.cells.expert_given_bin is result.cells.bin_given_expert is None
    assert result.first(1).cells.expert_given_bin is None


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
    assert content['num_images'] == 2
    assert content['given'] == {}
    assert content['p_adjusted'] == content['p_value']
    assert np.shape(content['cell_p']) == (3, 2)
    assert content['expert_given_bin_interval'] is None  # of two images
    assert len(content['interval']) == 2
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


@pytest.mark.parametrize('seed', range(8))
def test_few_images_are_not_significant_by_rounding(seed):
    """Of 2 to 8 images some flips are the data again: a corrected p-value is never the smaller."""
    rng = np.random.default_rng(seed)
    images, per_image = int(rng.integers(2, 9)), 40
    rows = np.arange(images * per_image)
    bins, level = rng.integers(0, 3, (2, len(rows)))
    weights = rng.random((len(rows), 4)) + 3 * np.eye(4)[(bins + level) % 4]
    made = Association(3, 4, ('level',))
    image = rows // per_image
    made.add(rows, bins, np.ones(len(rows)), weights, image, {'level': level})
    for test in made.result(999).tests:
        assert adjusted([test]) == [pytest.approx(test.p_value)]
