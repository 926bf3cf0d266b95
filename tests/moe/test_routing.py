"""One Routing written out by hand: two images, two levels, the first one with 2×1 patches."""

import math

import pytest
import torch

from mmdet_moe.moe import Routing
from mmdet_moe.moe.metrics import (
    coefficient_of_variation_squared,
    conditional_entropy,
    entropy,
    mutual_information,
)

EXPERT_IDS = [[0, 2], [1, 0], [2, 1], [0, 1], [3, 0], [0, 3]]
WEIGHTS = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.625, 0.375], [0.5, 0.5], [1.0, 0.0]]


@pytest.fixture
def routing():
    return Routing(
        expert_ids=torch.tensor(EXPERT_IDS),
        weights=torch.tensor(WEIGHTS, requires_grad=True),
        logits=torch.zeros(6, 4),
        items_per_level=(4, 2),
        num_images=2,
        decision_weights=torch.tensor([1.0, 0.0, 2.0, 1.0, 4.0, 0.5]),
    )


def test_sizes_and_order(routing):
    assert (routing.num_items, routing.num_experts, routing.top_k) == (6, 4, 2)
    assert routing.level_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert routing.image_ids.tolist() == [0, 0, 1, 1, 0, 1]
    ids, weights = routing.level(1)
    assert ids.tolist() == EXPERT_IDS[4:]
    assert weights.tolist() == WEIGHTS[4:]


def test_gates_are_the_factors(routing):
    """Of either sign; who was chosen is told by the weights alone."""
    assert routing.factors is routing.weights
    load = routing.load()
    routing.gates = torch.tensor([[-1.0, 2], [3, -4], [5, 0], [6, 7], [8, -9], [1, 0]])
    routing.dropped = torch.zeros(6, 2, dtype=torch.bool)
    routing.dropped[5, 0] = True
    assert routing.level(1)[1].tolist() == [[8, -9], [0, 0]]
    assert torch.equal(routing.load(), load)
    assert routing.importance().sum() == 6


def test_dense_weights(routing):
    assert routing.dense_weights().tolist() == [
        [0.75, 0, 0.25, 0],
        [0.5, 0.5, 0, 0],
        [0, 0, 1.0, 0],
        [0.625, 0.375, 0, 0],
        [0.5, 0, 0, 0.5],
        [1.0, 0, 0, 0],
    ]


def test_importance_and_load(routing):
    # Column sums of the table above; a weight of exactly 0 is no load.
    assert routing.importance().tolist() == [3.375, 0.875, 1.25, 0.5]
    assert routing.load().tolist() == [5, 2, 2, 1]


def test_sums_of_many_items():
    """In float32, added one after the other, they would be 0.4 % off, and then stand still."""
    items = 400_000
    weights = torch.tensor([[0.7, 0.3]]).expand(items, 2)
    routing = Routing(
        expert_ids=torch.tensor([[0, 1]]).expand(items, 2),
        weights=weights,
        logits=torch.zeros(1, 2).expand(items, 2),
        items_per_level=(items,),
        num_images=1,
    )
    torch.testing.assert_close(
        routing.importance(), torch.tensor([0.7, 0.3]) * items, rtol=1e-6, atol=0
    )
    routing = Routing(
        expert_ids=torch.zeros(5, 1, dtype=torch.int64),
        weights=torch.ones(5, 1),
        logits=torch.zeros(5, 2),
        items_per_level=(5,),
        num_images=1,
        decision_weights=torch.tensor([2.0**24, 1, 1, 1, 1]),
    )
    assert routing.load(balancing=True).tolist() == [2**24 + 4, 0]


def test_importance_and_load_with_decision_weights(routing):
    assert routing.importance(balancing=True).tolist() == [
        0.75 + 0.625 + 4 * 0.5 + 0.5,
        0.375,
        0.25 + 2.0,
        4 * 0.5,
    ]
    assert routing.load(balancing=True).tolist() == [1 + 1 + 4 + 0.5, 1, 1 + 2, 4]


def test_gradient_of_the_importance(routing):
    (torch.tensor([1.0, 10.0, 100.0, 1000.0]) * routing.importance(balancing=True)).sum().backward()
    per_expert, decision = [1, 10, 100, 1000], [1, 0, 2, 1, 4, 0.5]
    expected = [
        [per_expert[e] * d for e in ids] for ids, d in zip(EXPERT_IDS, decision, strict=True)
    ]
    assert routing.weights.grad.tolist() == expected
    assert not routing.load().requires_grad


def test_unweighed_decisions_are_refused(routing):
    routing.decision_weights = None
    assert routing.load().tolist() == [5, 2, 2, 1]
    for balancing in (routing.importance, routing.load):
        with pytest.raises(RuntimeError, match='weigh_decisions'):
            balancing(balancing=True)


def test_entropy():
    p = torch.tensor([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0]], requires_grad=True)
    result = entropy(p)
    torch.testing.assert_close(result, torch.tensor([1.5 * math.log(2), 0.0]))
    result.sum().backward()
    assert p.grad.isfinite().all()


def test_mutual_information():
    independent = torch.tensor([0.25, 0.75])[:, None] * torch.tensor([0.5, 0.3, 0.2])
    assert mutual_information(independent).item() == pytest.approx(0, abs=1e-7)
    assert mutual_information(torch.eye(3) * 7).item() == pytest.approx(math.log(3))
    assert mutual_information(torch.zeros(2, 2)).item() == 0
    # p(a, b) = 3/8, 1/8, 1/8, 3/8 with marginals 1/2: 2 · 3/8 log(3/2) + 2 · 1/8 log(1/2).
    table = torch.tensor([[3, 1], [1, 3]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert mutual_information(table).item() == pytest.approx(expected)


def test_coefficient_of_variation_squared():
    # Mean 3, unbiased variance (4 + 0 + 4) / 2 = 4.
    assert coefficient_of_variation_squared(torch.tensor([1.0, 3, 5])).item() == pytest.approx(
        4 / 9
    )
    assert coefficient_of_variation_squared(torch.tensor([5.0])).item() == 0
    assert coefficient_of_variation_squared(torch.zeros(4)).item() == 0


def test_conditional_entropy():
    """By its definition, and as what is left of the entropy after the mutual information."""
    joint = torch.tensor([[2.0, 0, 1], [2, 4, 0]])
    given = [4 / 9 * math.log(2), 0, 0]
    assert conditional_entropy(joint).item() == pytest.approx(sum(given), abs=1e-12)
    p = joint.double() / 9
    left = entropy(p.sum(1)) - mutual_information(joint)
    assert conditional_entropy(joint).item() == pytest.approx(left.item(), abs=1e-12)
    assert conditional_entropy(torch.zeros(2, 3)) == 0
