"""The bound on an expert's items, against sorting by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import GAPRouter, MoELayer, Routing, Utilization
from mmdet_moe.moe.capacity import overflow


def routing(ids, weights, num_experts):
    weights = torch.tensor(weights, dtype=torch.float64)
    return Routing(
        expert_ids=torch.tensor(ids),
        weights=weights,
        logits=weights.new_zeros(len(ids), num_experts),
        items_per_level=(len(ids),),
        num_images=len(ids),
        decision_weights=weights.new_ones(len(ids)),
    )


def test_a_hand_example():
    # 8 routes, 4 experts: the fair share is 2. Expert 0 has 4, of which .9 and the first .6 stay.
    r = routing(
        [[0, 1], [0, 2], [0, 1], [0, 3]], [[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]], 4
    )
    dropped = [[False, False], [False, False], [True, False], [True, False]]
    assert overflow(r, 1.0).tolist() == dropped
    assert not overflow(r, 2.0).any()  # 4 items fit
    # ceil(0.5): one item each; expert 1 keeps the earlier of two equal weights.
    assert overflow(r, 0.25).tolist() == [
        [True, False],
        [False, False],
        [True, True],
        [True, False],
    ]


def test_one_choice_in_full_is_dropped_by_its_probability():
    """Weights of 1 say nothing; by their order alone, all of the last images would be dropped."""
    router = GAPRouter(3, 4, 1, noise=False, softmax='straight_through')
    nn.init.normal_(router.fc.weight, std=3)
    x = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    layers = [
        MoELayer(nn.Conv2d(3, 2, 1), 4, 1, router, capacity_factor=0.5),
        MoELayer(nn.Conv2d(3, 2, 1), 4, 1, copy.deepcopy(router), capacity_factor=0.5),
    ]
    layers[1].router.softmax = 'over_all'
    dropped = []
    for moe in layers:
        moe(x)
        dropped.append(moe.routing.dropped)
    assert dropped[0].any()
    assert torch.equal(*dropped)


def test_no_choice_takes_no_capacity():
    r = routing([[0, 1], [0, 1]], [[0.0, 1.0], [1.0, 0.0]], 2)
    assert not overflow(r, 0.5).any()


@pytest.mark.parametrize('factor', [0.3, 1.0, 1.25])
def test_against_sorting_each_expert(factor):
    torch.manual_seed(1)
    num_items, k, num_experts = 100, 3, 7
    ids = torch.rand(num_items, num_experts).mul(torch.linspace(0.2, 1, num_experts)).topk(k)[1]
    weights = torch.rand(num_items, k)
    weights[torch.rand(num_items, k) < 0.2] = 0
    dropped = overflow(routing(ids.tolist(), weights.tolist(), num_experts), factor)
    capacity = math.ceil(factor * num_items * k / num_experts)
    assert dropped.any()
    for e in range(num_experts):
        mine = (ids == e) & (weights > 0)
        kept = mine & ~dropped
        assert kept.sum() == min(capacity, mine.sum())
        if (mine & dropped).any():
            assert weights[mine & dropped].max() <= weights[kept].min()
    assert not dropped[weights == 0].any()


def layer(**kwargs):
    router = GAPRouter(3, 4, 2, noise=False)
    nn.init.normal_(router.fc.weight, std=3)
    experts = [nn.Conv2d(3, 2, 3, padding=1) for _ in range(4)]
    return MoELayer(experts, 4, 2, router, **kwargs).double()


def test_dropped_routes_give_nothing_and_balancing_still_sees_them():
    moe = layer(capacity_factor=0.5)
    maps = [torch.randn(8, 3, size, size, dtype=torch.float64) for size in (6, 3)]
    outputs = moe(maps)
    r = moe.routing
    assert r.num_dropped() > 0
    # Over both levels together: 16 items times 2 over 4 experts, half of the fair share of 8.
    kept = torch.zeros(4)
    for e in range(4):
        kept[e] = ((r.expert_ids == e) & ~r.dropped).sum()
    assert (kept <= 4).all()
    assert r.load().sum() == 32
    torch.testing.assert_close(r.importance().sum(), torch.tensor(16.0).double())
    weights = torch.zeros(16, 4, dtype=torch.float64)
    weights.scatter_(1, r.expert_ids, r.weights.masked_fill(r.dropped, 0))
    for x, y, w in zip(maps, outputs, weights.split(8), strict=True):
        dense = torch.stack([expert(x) for expert in moe.experts], dim=1)
        torch.testing.assert_close(y, (w[:, :, None, None, None] * dense).sum(1))
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_inference_has_no_bound():
    moe, free = layer(capacity_factor=0.25).eval(), layer().eval()
    free.load_state_dict(moe.state_dict())
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(moe(x), free(x))
    assert moe.routing.dropped is None


def test_dropped_rows_are_counted():
    moe = layer(capacity_factor=0.25)
    utilization = Utilization(4)
    moe(torch.randn(8, 3, 5, 5, dtype=torch.float64))
    utilization.update(moe.routing, moe.router)
    report = utilization.report()
    assert report.dropped == pytest.approx(float(moe.routing.dropped.sum()) / 16)
    assert report.scalars()['dropped'] == report.dropped
    assert f'dropped {100 * report.dropped:.1f} %' in str(report)


@pytest.mark.parametrize('factor', [0, -1.0, float('nan'), float('inf'), '1', True])
def test_capacity_of_nothing(factor):
    with pytest.raises(ConfigError, match=r'capacity_factor=.* must be a finite number'):
        layer(capacity_factor=factor)
