"""Dispatch and combine against loops and numbers written out."""

import pytest
import torch
from torch.autograd import gradcheck

from mmdet_moe.ops import combine, dispatch, sort_routes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def random_ids(num_items, k, num_experts):
    """K different experts per item."""
    return torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_items)])


def test_sort_routes_on_a_hand_example():
    # Routes in order: 2, 0 | 0, 1 | 2, 1. Expert 3 gets nothing.
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order, offsets, inverse = sort_routes(ids, 4)
    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    assert offsets.tolist() == [0, 2, 4, 6, 6]
    assert inverse.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert {t.dtype for t in (order, offsets, inverse)} == {torch.int64}


@pytest.mark.parametrize(('num_items', 'k', 'num_experts'), [(1, 1, 1), (7, 3, 3), (50, 2, 9)])
def test_sort_routes_groups_by_expert_in_item_order(num_items, k, num_experts):
    ids = random_ids(num_items, k, num_experts)
    order, offsets, inverse = sort_routes(ids, num_experts)
    routes = ids.flatten().tolist()
    expected = [r for e in range(num_experts) for r, chosen in enumerate(routes) if chosen == e]
    assert order.tolist() == expected
    assert offsets.tolist() == [sum(c < e for c in routes) for e in range(num_experts + 1)]
    for route, position in enumerate(inverse.flatten().tolist()):
        assert expected[position] == route


def test_no_items():
    order, offsets, inverse = sort_routes(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert order.numel() == 0
    assert offsets.tolist() == [0, 0, 0, 0]
    assert inverse.shape == (0, 2)
    rows = dispatch(torch.zeros(0, 5, 4), order, 2)
    assert rows.shape == (0, 5, 4)
    assert combine(rows, torch.zeros(0, 2), inverse).shape == (0, 5, 4)


@pytest.mark.parametrize(
    'ids', [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4, 2).int()]
)
def test_sort_routes_refuses_other_tensors(ids):
    with pytest.raises(ValueError, match='expert_ids must be an int64 tensor of shape'):
        sort_routes(ids, 3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('trailing', [(), (3,), (2, 3, 4)])
def test_dispatch_copies_rows(dtype, trailing):
    x = torch.randint(-9, 9, (6, *trailing)).to(dtype)
    order, _, _ = sort_routes(random_ids(6, 2, 4), 4)
    rows = dispatch(x, order, 2)
    assert rows.dtype == dtype
    for row, route in zip(rows, order.tolist(), strict=True):
        assert torch.equal(row, x[route // 2])


@pytest.mark.parametrize('k', [1, 2, 5])
@pytest.mark.parametrize('trailing', [(), (3,), (2, 3, 4)])
def test_combine_is_the_weighted_sum(k, trailing):
    ids, weights = random_ids(8, k, 5), torch.rand(8, k, dtype=torch.float64)
    outputs = torch.randn(5, 8, *trailing, dtype=torch.float64)  # of expert e for item t
    order, _, inverse = sort_routes(ids, 5)
    rows = torch.stack([outputs[ids.flatten()[r], r // k] for r in order])
    expected = torch.stack(
        [sum(weights[t, j] * outputs[ids[t, j], t] for j in range(k)) for t in range(8)]
    )
    torch.testing.assert_close(combine(rows, weights, inverse), expected, rtol=0, atol=1e-14)


def test_combine_accumulates_half_precision_in_float32():
    # bfloat16 has 8 significant bits: 256 + 1 rounds to 256, so a bfloat16 sum would stay at 256.
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    inverse = torch.arange(5).view(1, 5)
    total = combine(rows, torch.ones(1, 5), inverse)
    assert total.dtype == torch.bfloat16
    assert total.item() == 260.0


def test_gradients_by_finite_differences():
    ids = random_ids(4, 2, 3)
    order, _, inverse = sort_routes(ids, 3)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(8, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: dispatch(x, order, 2), (x,))
    assert gradcheck(lambda y, w: combine(y, w, inverse), (rows, weights))
