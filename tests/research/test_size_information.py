"""Information beyond the level, against scikit-learn and planted dependencies."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from mmdet_moe.analysis.records.contents import (
    ControlRecords,
    DecisionRecords,
    DetectionRecords,
    DetectorLayerRecords,
    DetectorRecords,
    ImageRecords,
    LinkRecords,
    ObjectRecords,
    OriginRecords,
)
from mmdet_moe.moe import GAPRouter, MoELayer
from research.size_information import (
    Parts,
    _permuted,
    given_level,
    information,
    parts_of,
    randomise,
    tables,
)


def parts(expert_of, objects=600, seed=0):
    """Objects of 100 images on 3 levels, with one expert each: ``expert_of(level, size, rng)``."""
    rng = np.random.default_rng(seed)
    size = rng.integers(6, size=objects)
    level = size // 2
    expert = np.array([expert_of(x, y, rng) for x, y in zip(level, size, strict=True)])
    image = np.sort(rng.integers(100, size=objects))
    return Parts(level, image, np.ones(objects), np.eye(4)[expert], {'size': size}), expert


def test_against_scikit_learn():
    made, expert = parts(
        lambda level, size, rng: rng.integers(4) if rng.random() < 0.5 else size % 3
    )
    size, level = made.bins['size'], made.level
    by_level = [mutual_info_score(size[level == i], expert[level == i]) for i in range(3)]
    expected = np.bincount(level) / len(level) @ by_level
    found = information(made, 'size', permutations=5)
    assert found['given_level'] == pytest.approx(expected)
    assert found['by_level'] == pytest.approx(by_level)
    assert found['mi'] == pytest.approx(mutual_info_score(size, expert))
    # The chain rule: I(size; expert | level) = I((size, level); expert) - I(level; expert).
    both = mutual_info_score(size + 10 * level, expert) - mutual_info_score(level, expert)
    assert found['given_level'] == pytest.approx(both)


def test_weights_and_shares_are_counts():
    """Half an object with weights 0.75 and 0.25 is 0.375 and 0.125 of a count."""
    made = Parts(
        np.array([0, 1]), np.zeros(2, int), np.array([0.5, 0.5]),
        np.array([[0.75, 0.25], [0.0, 1.0]]), {'size': np.array([1, 0])},
    )  # fmt: skip
    assert tables(made, 'size').tolist() == [[[0, 0], [0.375, 0.125]], [[0, 0.5], [0, 0]]]


@pytest.mark.parametrize('planted', [False, True])
def test_level_alone_is_no_information_beyond_it(planted):
    """Experts of a level each, and experts of the two sizes of each level."""
    made, _ = parts(lambda level, size, rng: size % 2 if planted else level)
    found = information(made, 'size', permutations=99)
    if planted:
        assert found['given_level'] == pytest.approx(np.log(2), abs=0.01)
        assert found['p_value'] == 0.01
        assert found['chance'] < 0.02
    else:
        assert found['mi'] == pytest.approx(np.log(3), abs=0.02)
        assert found['given_level'] == pytest.approx(0)
        assert found['p_value'] == 1


def test_chance_of_experts_at_random():
    p_values = []
    for seed in range(20):
        made, _ = parts(lambda level, size, rng: rng.integers(4), seed=seed)
        found = information(made, 'size', permutations=99)
        assert found['given_level'] == pytest.approx(found['chance'], abs=0.02)
        p_values.append(found['p_value'])
    assert 0.25 < np.mean(p_values) < 0.75


def test_permutations_keep_levels_and_images_together():
    made, _ = parts(lambda level, size, rng: 0)
    order = _permuted(made, np.random.default_rng(0))
    assert sorted(order) == list(range(600))
    assert (made.level[order] == made.level).all()
    for level in range(3):
        rows = np.flatnonzero(made.level == level)
        images = made.image[order[rows]]
        assert (np.diff(images) != 0).sum() == len(set(images)) - 1
        assert (images != made.image[rows]).mean() > 0.9


def test_parts_of_records():
    """Two objects of image 7, the first one with anchors on two levels."""
    nothing = np.zeros(0)
    links = LinkRecords(
        owner=np.array([0, 0, 0, 1]),
        unit=np.arange(4),
        level=np.array([0, 0, 1, 1]),
        share=np.array([0.25, 0.5, 0.25, 1.0]),
        weights=np.array([[1.0, 0], [0, 1], [0.5, 0.5], [0, 2]], np.float32),
    )
    records = DetectorRecords(
        ImageRecords(np.array([7]), np.array([[90, 180]])),
        DetectionRecords(*[nothing] * 6),
        ObjectRecords(
            np.array([7, 7]), np.array([[0, 0, 20, 20], [150, 60, 180, 90.0]]), np.array([3, 5]),
            np.zeros(2, bool), np.zeros(2, int),
        ),
        [
            DetectorLayerRecords(
                DecisionRecords(*[nothing] * 5), links, ControlRecords(*[nothing] * 3),
                OriginRecords(nothing, nothing),
            )
        ],
    )  # fmt: skip
    found = parts_of([records], 0)
    assert found.level.tolist() == [0, 1, 1]
    assert found.image.tolist() == [7, 7, 7]
    assert found.share.tolist() == [0.75, 0.25, 1.0]
    np.testing.assert_allclose(found.weights, [[1 / 3, 2 / 3], [0.5, 0.5], [0, 1]])
    assert found.bins['class'].tolist() == [3, 3, 5]
    assert found.bins['position'].tolist() == [0, 0, 8]
    assert found.bins['size'].tolist() == [3, 3, 4]  # 16-23 px, and 23-32 px


def test_empty_levels_count_nothing():
    table = torch.zeros(2, 2, 2)
    table[0] = torch.eye(2)
    assert given_level(table) == pytest.approx(np.log(2))


def test_random_routers():
    router = GAPRouter(4, 3, 2, noise=False, normalise_levels=1)
    model = torch.nn.Sequential(MoELayer(torch.nn.Conv2d(4, 4, 1), 3, 2, router))
    router([torch.randn(5, 4, 2, 2)])
    before = router.fc.weight.clone()
    (norm,) = randomise(model, 0)
    assert norm.batches.tolist() == [0]
    assert not torch.equal(router.fc.weight, before)
    assert router.fc.weight.std().item() == pytest.approx(before.std().item(), rel=0.5)
