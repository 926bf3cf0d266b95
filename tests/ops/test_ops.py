"""The reference, the CPU and the CUDA kernels against loops and sums in float64."""

import pytest
import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ANY = [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64]
sweep = pytest.mark.sweep(keep=1 / 8, each=('ops', 'device'))
# Around the sizes of vector registers, blocks and stretches of the kernels.
WIDTHS = [
    (),
    (1,),
    (3,),
    (2, 3, 4),
    (31,),
    (32,),
    (33,),
    (255,),
    (513,),
    (8192,),
    (8193,),
    (20000,),
]


def random_ids(num_items, k, num_experts, drop=0.0):
    """K different experts per item; a share of the routes is no choice."""
    ids = torch.rand(num_items, num_experts).topk(k).indices
    return ids.masked_fill(torch.rand(num_items, k) < drop, -1)


def loop_sort(ids, num_experts):
    """The routes in expert order, and the offsets, by their definition."""
    routes = ids.flatten().tolist()
    by_expert = [[r for r, e in enumerate(routes) if e == wanted] for wanted in range(num_experts)]
    order = [r for routes_of_one in by_expert for r in routes_of_one]
    offsets = [sum(map(len, by_expert[:e])) for e in range(num_experts + 1)]
    order += [r for r, e in enumerate(routes) if e == -1]
    return order, offsets


def routes_on(device, ops, ids, num_experts):
    """Sorted routes without those of nobody, and their positions, on the device."""
    offsets, inverse = ops.sort_routes(ids.to(device), num_experts)
    return inverse.flatten().argsort()[: int(offsets[-1])], inverse


def tolerance(dtype, terms):
    # Results are rounded once to their dtype; sums are made in float32 at least.
    return max(torch.finfo(dtype).eps, terms * torch.finfo(torch.float32).eps)


def test_sort_routes_on_a_hand_example(ops, device):
    # Routes in order: 2, 0 | 0, 1 | none, 1. Expert 3 gets nothing.
    ids = torch.tensor([[2, 0], [0, 1], [-1, 1]], device=device)
    offsets, inverse = ops.sort_routes(ids, 4)
    assert offsets.tolist() == [0, 2, 4, 5, 5]
    assert inverse.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert offsets.dtype == inverse.dtype == torch.int64


@pytest.mark.parametrize('drop', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ('num_items', 'k', 'num_experts'), [(1, 1, 1), (7, 3, 3), (50, 2, 9), (300, 4, 1024)]
)
def test_sort_routes_groups_by_expert_in_item_order(ops, device, num_items, k, num_experts, drop):
    ids = random_ids(num_items, k, num_experts, drop)
    offsets, inverse = ops.sort_routes(ids.to(device), num_experts)
    order, expected_offsets = loop_sort(ids, num_experts)
    assert offsets.tolist() == expected_offsets
    assert inverse.flatten()[order].tolist() == list(range(num_items * k))


def numpy_sort(ids, num_experts):
    """Offsets and inverse by numpy's stable sort."""
    flat = ids.flatten().numpy()
    keys = (flat + (flat < 0) * (num_experts + 1)).astype('int32')
    order = keys.argsort(kind='stable')
    offsets = keys[order].searchsorted(range(num_experts + 1))
    inverse = order.argsort()  # of a permutation
    return torch.from_numpy(offsets), torch.from_numpy(inverse).view(ids.shape)


# The CUDA kernels sort up to 4,096 routes to up to 512 experts in one block, 1,024 at a time.
@pytest.mark.parametrize('num_experts', [1, 7, 512, 513])
@pytest.mark.parametrize(
    'shape', [(1, 1), (33, 1), (512, 2), (205, 5), (1365, 3), (2048, 2), (241, 17)]
)
def test_sort_routes_of_one_block(ops, device, shape, num_experts):
    few = torch.randperm(num_experts)[:3]  # the others get nothing
    cases = {
        'any': torch.randint(-1, num_experts, shape),
        'few': few[torch.randint(len(few), shape)],
        'one': torch.full(shape, num_experts - 1),
        'none': torch.full(shape, -1),
    }
    for name, ids in cases.items():
        offsets, inverse = ops.sort_routes(ids.to(device), num_experts)
        expected_offsets, expected_inverse = numpy_sort(ids, num_experts)
        assert torch.equal(offsets.cpu(), expected_offsets), name
        assert torch.equal(inverse.cpu(), expected_inverse), name


@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('num_experts', [2, 1024])
def test_sort_routes_on_many_routes(ops, device, num_experts, threads, set_threads):
    """2^18 routes, which several threads share; numpy's stable sort is the other opinion."""
    set_threads(threads)
    ids = torch.randint(-1, num_experts, (1 << 17, 2))
    result = ops.sort_routes(ids.to(device), num_experts)
    for value, expected in zip(result, numpy_sort(ids, num_experts), strict=True):
        assert torch.equal(value.cpu(), expected)


def test_sort_routes_on_sixteen_million_routes(device):
    """2^24 routes to 1,024 experts, by the kernels that are in use."""
    ids = torch.randint(0, 1024, (1 << 23, 2), device=device)
    offsets, inverse = torch.ops.mmdet_moe.sort_routes(ids, 1024)
    order = torch.empty_like(inverse.flatten())
    order[inverse.flatten()] = torch.arange(1 << 24, device=device)
    experts = ids.flatten()[order]
    assert bool((experts.diff() >= 0).all())
    assert bool((order.diff()[experts.diff() == 0] > 0).all())  # stable
    assert torch.equal(offsets[1:], experts.bincount(minlength=1024).cumsum(0))
    assert torch.equal(inverse.flatten()[order], torch.arange(1 << 24, device=device))


@pytest.mark.parametrize('wrong', [-2, 3, 1 << 40])
def test_sort_routes_refuses_unknown_experts(ops, device, wrong):
    if device.type == 'cuda':
        pytest.skip('a device-side assertion ends the process')
    ids = torch.tensor([[0, 1], [2, wrong]])
    message = rf'expert_ids holds {wrong}.* ids must lie in \[0, 3\), or be -1'
    with pytest.raises(RuntimeError, match=message):
        ops.sort_routes(ids, 3)


@pytest.mark.parametrize('trailing', [(5, 4), (0,)])
def test_no_items(ops, device, trailing):
    offsets, inverse = ops.sort_routes(torch.zeros(0, 2, dtype=torch.int64, device=device), 3)
    assert offsets.tolist() == [0, 0, 0, 0]
    assert inverse.shape == (0, 2)
    rows = ops.dispatch(torch.zeros(0, *trailing, device=device), inverse, 0)
    assert rows.shape == (0, *trailing)
    weights = torch.zeros(0, 2, device=device)
    assert ops.combine(rows, weights, inverse).shape == (0, *trailing)
    assert ops.dispatch_backward(rows, inverse).shape == (0, *trailing)
    grads = ops.combine_backward(rows, rows, weights, inverse)
    assert [g.shape for g in grads] == [(0, *trailing), (0, 2)]


def test_no_rows(ops, device):
    """Items whose routes are all nobody's."""
    _, inverse = routes_on(device, ops, torch.full((3, 2), -1), 4)
    x, weights = torch.rand(3, 5, device=device), torch.rand(3, 2, device=device)
    rows = ops.dispatch(x, inverse, 0)
    assert rows.shape == (0, 5)
    assert torch.equal(ops.combine(rows, weights, inverse), torch.zeros_like(x))
    assert torch.equal(ops.dispatch_backward(rows, inverse), torch.zeros_like(x))
    grad_y, grad_weights = ops.combine_backward(x, rows, weights, inverse)
    assert grad_y.shape == (0, 5)
    assert torch.equal(grad_weights, torch.zeros_like(weights))


def test_rows_without_values(ops, device):
    ids = random_ids(4, 2, 3)
    _, inverse = routes_on(device, ops, ids, 3)
    x, weights = torch.zeros(4, 0, device=device), torch.rand(4, 2, device=device)
    assert ops.dispatch(x, inverse, 8).shape == (8, 0)
    grad_y, grad_weights = ops.combine_backward(x, x.new_zeros(8, 0), weights, inverse)
    assert grad_y.shape == (8, 0)
    assert torch.equal(grad_weights, torch.zeros_like(weights))


@sweep
@pytest.mark.parametrize(('k', 'drop'), [(1, 0.4), (2, 0.0), (2, 0.4), (9, 0.4)])
@pytest.mark.parametrize('dtype', ANY, ids=str)
@pytest.mark.parametrize('trailing', WIDTHS, ids=str)
def test_dispatch_copies_rows(ops, device, dtype, trailing, k, drop):
    x = torch.randint(-9, 9, (6, *trailing)).to(dtype)
    order, inverse = routes_on(device, ops, random_ids(6, k, 10, drop), 10)
    rows = ops.dispatch(x.to(device), inverse, len(order))
    assert rows.dtype == dtype
    assert rows.shape == (len(order), *trailing)
    for row, route in zip(rows.cpu(), order.tolist(), strict=True):
        assert torch.equal(row, x[route // k])


@sweep
@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('k', [1, 2, 3, 20])
@pytest.mark.parametrize('trailing', WIDTHS, ids=str)
def test_gradient_of_dispatch_is_the_sum(ops, device, dtype, k, trailing):
    ids = random_ids(5, k, 21, drop=0.3)
    order, inverse = routes_on(device, ops, ids, 21)
    grad = torch.randn(len(order), *trailing).to(dtype)
    expected = torch.zeros(5, *trailing, dtype=torch.float64)
    for row, route in zip(grad.double(), order.tolist(), strict=True):
        expected[route // k] += row
    result = ops.dispatch_backward(grad.to(device), inverse)
    assert result.dtype == dtype
    eps = tolerance(dtype, k)
    torch.testing.assert_close(result.cpu().double(), expected, rtol=eps, atol=eps * 10)


@sweep
@pytest.mark.parametrize('drop', [0.0, 0.4])
@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('k', [1, 2, 3, 20])
@pytest.mark.parametrize('trailing', WIDTHS, ids=str)
def test_combine_and_its_gradients(ops, device, dtype, k, trailing, drop):
    ids = random_ids(5, k, 21, drop)
    order, inverse = routes_on(device, ops, ids, 21)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, grad = torch.randn(len(order), *trailing).to(dtype), torch.randn(5, *trailing).to(dtype)
    weights = torch.rand(5, k, dtype=wide)
    expected = torch.zeros(5, *trailing, dtype=torch.float64)
    grad_y, grad_weights = torch.zeros_like(y, dtype=torch.float64), torch.zeros(5, k).double()
    for m, route in enumerate(order.tolist()):
        t, j = divmod(route, k)
        expected[t] += weights[t, j].double() * y[m].double()
        grad_y[m] = weights[t, j].double() * grad[t].double()
        grad_weights[t, j] = (grad[t].double() * y[m].double()).sum()
    on_device = [v.to(device) for v in (y, weights)]
    result = ops.combine(*on_device, inverse)
    assert result.dtype == dtype
    eps = tolerance(dtype, k)
    torch.testing.assert_close(result.cpu().double(), expected, rtol=eps, atol=eps * 10)
    results = ops.combine_backward(grad.to(device), *on_device, inverse)
    assert [r.dtype for r in results] == [dtype, wide]
    torch.testing.assert_close(results[0].cpu().double(), grad_y, rtol=eps, atol=eps)
    # Random signs: the error of a sum of n products grows like the square root of n.
    eps = torch.finfo(wide).eps * max(8, y[:1].numel())
    torch.testing.assert_close(results[1].cpu().double(), grad_weights, rtol=eps, atol=eps)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('width', [1000, 1024, 1 << 19])
@pytest.mark.parametrize('ops', ['native'], indirect=True)
def test_rows_larger_than_the_caches(ops, device, dtype, width):
    """Above 16 MiB the CPU kernels store past the caches."""
    k, num_items = 2, (20 << 20) // dtype.itemsize // width
    ids = random_ids(num_items, k, 4, drop=0.1)
    order, inverse = routes_on(device, ops, ids, 4)
    x = torch.randn(num_items, width, device=device).to(dtype)
    rows = ops.dispatch(x, inverse, len(order))
    assert torch.equal(rows, x[order // k])
    weights = torch.rand(num_items, k, device=device)
    chosen = weights * (ids.to(device) >= 0)
    torch.testing.assert_close(
        ops.combine(rows, weights, inverse), (x.float() * chosen.sum(1, keepdim=True)).to(dtype)
    )
    grad_y, grad_weights = ops.combine_backward(x, rows, weights, inverse)
    flat = chosen.flatten()[order, None]
    torch.testing.assert_close(grad_y, (x[order // k].float() * flat).to(dtype))
    squares = x.double().square().sum(1, keepdim=True) * (ids.to(device) >= 0)
    torch.testing.assert_close(grad_weights.double(), squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize('shift', [1, 3])
def test_tensors_that_are_not_aligned(ops, device, shift):
    def shifted(*shape):
        numbers = torch.randn(shift + torch.Size(shape).numel(), device=device)
        return numbers[shift:].view(shape)

    ids = random_ids(9, 2, 4)
    _, inverse = routes_on(device, ops, ids, 4)
    x, y, grad, weights = shifted(9, 37), shifted(18, 37), shifted(9, 37), shifted(9, 2)
    for name, arguments in {
        'dispatch': (x, inverse, 18),
        'dispatch_backward': (y, inverse),
        'combine': (y, weights, inverse),
        'combine_backward': (grad, y, weights, inverse),
    }.items():
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.testing.assert_close(getattr(ops, name)(*arguments), getattr(ops, name)(*copies))


def test_tensors_that_are_not_contiguous(ops, device):
    ids = random_ids(6, 2, 4)
    offsets, inverse = ops.sort_routes(ids.to(device), 4)
    strange = ids.to(device).t().contiguous().t()
    for a, b in zip(ops.sort_routes(strange, 4), (offsets, inverse), strict=True):
        assert torch.equal(a, b)
    x, y, grad = (torch.randn(n, 5, 7, device=device) for n in (6, 12, 6))
    weights = torch.rand(6, 2, device=device)

    def strided(t):
        doubled = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
        doubled[..., ::2] = t
        return doubled[..., ::2]

    for name, arguments in {
        'dispatch': (x, inverse, 12),
        'dispatch_backward': (y, inverse),
        'combine': (y, weights, inverse),
        'combine_backward': (grad, y, weights, inverse),
    }.items():
        views = [strided(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.testing.assert_close(
            getattr(ops, name)(*views), getattr(ops, name)(*arguments), rtol=0, atol=0
        )


def test_half_precision_is_summed_in_float32(ops, device):
    # bfloat16 has 8 significant bits: 256 + 1 rounds to 256, so a bfloat16 sum would stay at 256.
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], device=device).bfloat16()
    inverse = torch.arange(5, device=device).view(1, 5)
    total = ops.combine(rows, torch.ones(1, 5, device=device), inverse)
    assert total.item() == 260.0
    assert ops.dispatch_backward(rows, inverse).item() == 260.0


def test_dropped_rows_are_not_touched(ops, device):
    """A weight of NaN on a route without a row reaches neither the sum nor the gradients."""
    y = torch.ones(1, 3, device=device)
    weights = torch.tensor([[float('nan'), 2.0]], device=device)
    inverse = torch.tensor([[1, 0]], device=device)
    assert ops.combine(y, weights, inverse).tolist() == [[2.0, 2.0, 2.0]]
    grad_y, grad_weights = ops.combine_backward(
        torch.ones(1, 3, device=device), y, weights, inverse
    )
    assert grad_y.tolist() == [[2.0, 2.0, 2.0]]
    assert grad_weights.tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize('width', [256, 30000])
def test_bitwise_equal_from_run_to_run(ops, device, width, set_threads):
    """Also with another number of threads."""
    if ops is not torch.ops.mmdet_moe and device.type == 'cpu':
        pytest.skip("PyTorch's sums depend on the number of threads")
    ids = random_ids(200, 3, 8)
    _, inverse = routes_on(device, ops, ids, 8)
    x, y, weights = torch.randn(200, width), torch.randn(600, width), torch.rand(200, 3)
    x, y, weights = x.to(device), y.to(device), weights.to(device)
    seen = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        seen.append(
            (
                ops.combine(y, weights, inverse),
                ops.dispatch_backward(y, inverse),
                *ops.combine_backward(x, y, weights, inverse),
            )
        )
    for results in seen[1:]:
        for result, first in zip(results, seen[0], strict=True):
            assert torch.equal(result, first)


@pytest.mark.sweep(keep=0)  # takes long
def test_more_than_two_to_the_31_values(device):
    """Offsets are computed in 64 bits. Zeros that are only read take no memory on the CPU."""
    width = 800_000_000  # the third row starts at 1.6e9, and ends at 2.4e9 > 2^31
    x = torch.zeros(1, width, dtype=torch.uint8, device=device)
    x[0, -1] = 7
    inverse = torch.arange(3, device=device).view(1, 3)
    rows = torch.ops.mmdet_moe.dispatch(x, inverse, 3)
    assert rows.shape == (3, width)
    assert rows[:, -1].tolist() == [7, 7, 7]
    assert rows[2, -1000:-1].count_nonzero() == 0
    del rows
    y = torch.zeros(3, width, dtype=torch.bfloat16, device=device)
    y[:, -1] = torch.tensor([1.0, 2.0, 4.0])
    weights = torch.tensor([[1.0, 1.0, 2.0]], device=device)
    total = torch.ops.mmdet_moe.combine(y, weights, inverse)
    assert total[0, -1].item() == 11.0
    assert total[0, -1000:-1].count_nonzero() == 0
