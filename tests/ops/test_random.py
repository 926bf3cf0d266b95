"""Compiled kernels against the reference on random arguments, anywhere in memory."""

import random

import pytest
import torch

from mmdet_moe.ops import reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.sweep(keep=1 / 10, each=('device',)),
    pytest.mark.parametrize('ops', ['native'], indirect=True),
    pytest.mark.parametrize('seed', range(200)),
]


@pytest.fixture
def rng(seed):
    torch.manual_seed(seed)
    return random.Random(seed)


def placed(tensor, device, rng):
    """The same values on the device: contiguous, at an odd address, with gaps, or transposed."""
    tensor = tensor.to(device)
    how = rng.choice(['contiguous', 'shifted', 'gaps', 'transposed'])
    if how == 'shifted':
        shift = rng.randint(1, 8)
        result = tensor.new_empty(shift + tensor.numel())[shift:].view(tensor.shape)
        return result.copy_(tensor)
    if how == 'gaps':
        return tensor.new_empty(*tensor.shape, 3)[..., 1].copy_(tensor)
    if how == 'transposed':
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return tensor


def near(results, expected, eps):
    """Within eps of the magnitude, or of 1 where there is cancellation."""
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), value.double(), rtol=eps, atol=10 * eps)


def test_rows(ops, device, rng):
    dtype = rng.choice(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_experts = rng.choice([1, 2, 7, 8, 255, 256, 1024, 70_000])
    k = rng.randint(1, min(num_experts, rng.choice([1, 2, 3, 8, 33])))
    vector = 16 // dtype.itemsize
    width = rng.choice([0, 1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 128, 129, 900])
    width = max(width * vector + rng.choice([0, 0, 0, -1, 1]), 0)
    num_items = rng.choice([n for n in (0, 1, 2, 5, 31, 64, 257) if n * k * width < 100_000])
    ids = torch.rand(num_items, num_experts).topk(k).indices
    ids[torch.rand(ids.shape) < rng.choice([0, 0, 0.3, 1])] = -1
    shape = (width,) if width % 3 else (width // 3, 3)

    def put(tensor):
        return placed(tensor, device, rng)

    offsets, inverse = reference.sort_routes(ids, num_experts)
    for result, value in zip(
        ops.sort_routes(put(ids), num_experts), (offsets, inverse), strict=True
    ):
        assert torch.equal(result.cpu(), value)
    num_rows = rng.choice([int(offsets[-1]), inverse.numel()])
    x, grad = (torch.randn(num_items, *shape).to(dtype) for _ in range(2))
    y, weights = torch.randn(num_rows, *shape).to(dtype), torch.rand(num_items, k, dtype=wide)
    rows = ops.dispatch(put(x), put(inverse), num_rows)
    assert torch.equal(rows.cpu(), reference.dispatch(x, inverse, num_rows))
    eps = max(torch.finfo(dtype).eps, k * torch.finfo(torch.float32).eps)
    result = ops.dispatch_backward(put(y), put(inverse))
    near([result], [reference.dispatch_backward(y.double(), inverse)], eps)
    result = ops.combine(put(y), put(weights), put(inverse))
    near([result], [reference.combine(y.double(), weights.double(), inverse)], eps)
    grads = ops.combine_backward(put(grad), put(y), put(weights), put(inverse))
    expected = reference.combine_backward(grad.double(), y.double(), weights.double(), inverse)
    near(grads[:1], expected[:1], eps)
    near(grads[1:], expected[1:], torch.finfo(wide).eps * max(8, width))


def test_entmax15(ops, device, rng):
    dtype = rng.choice([torch.float64, torch.float32])
    n = rng.choice([1, 2, 3, 31, 32, 33, 63, 64, 65, 256, 1000, 2047, 2048, 2049, 4100])
    x = rng.choice([0.1, 1, 10]) * torch.randn(rng.choice([1, 2, 7, 8, 9, 17]), n).to(dtype)
    grad = torch.randn_like(x)
    p = ops.entmax15(placed(x, device, rng))
    expected = reference.entmax15(x.double())
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    near([p], [expected], eps)
    result = ops.entmax15_backward(placed(grad, device, rng), placed(p.cpu(), device, rng))
    near([result], [reference.entmax15_backward(grad.double(), p.cpu().double())], 10 * eps)
