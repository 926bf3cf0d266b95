"""entmax15 of every implementation against the package ``entmax``, which sorts, and by hand."""

import math

import entmax
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mmdet_moe.ops import entmax15, reference

INF, NAN = math.inf, math.nan
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-6}


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('n', [1, 2, 31, 33, 64, 256, 1025, 5000])
def test_values_and_gradients(ops, device, n, dtype):
    for scale, offset in ((0, 0), (0.1, 0), (1, 0), (1, 1000), (30, -5)):
        x = (torch.randn(6, n) * scale + offset).to(device, dtype)
        grad = torch.randn(6, n).to(device, dtype)
        exact = x.double().requires_grad_()
        expected = entmax.entmax15(exact, dim=-1)
        (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
        p = ops.entmax15(x)
        assert (p.dtype, p.device.type) == (dtype, device.type)
        near = dict(rtol=0, atol=TOLERANCES[dtype], check_dtype=False)
        torch.testing.assert_close(p, expected.detach(), **near)
        torch.testing.assert_close(ops.entmax15_backward(grad, p), expected_grad, **near)
        torch.testing.assert_close(p.double().sum(-1), torch.ones(6).to(p).double(), **near)


def test_by_hand(ops, device):
    # Of two values that differ by d < 2, the roots of p differ by d / 2, and p sums to 1.
    d = torch.tensor([0.0, 0.5, 1.9, 2.0, 7.0], dtype=torch.float64, device=device)
    root = (d / 2 + (2 - (d / 2).square()).clamp(min=0).sqrt()) / 2
    first = root.square().where(d < 2, 1)
    p = ops.entmax15(torch.stack([d, torch.zeros_like(d)], dim=-1))
    torch.testing.assert_close(p, torch.stack([first, 1 - first], dim=-1))
    # Ties share alike, also where others are far below.
    x = torch.tensor([[3.0, 3, 3, 3], [7, -9, 7, -9]], device=device)
    torch.testing.assert_close(ops.entmax15(x), x.new_tensor([[0.25] * 4, [0.5, 0, 0.5, 0]]))
    torch.testing.assert_close(ops.entmax15(x.new_ones(2, 10_000)), x.new_full((2, 10_000), 1e-4))


@pytest.mark.parametrize('n', [3, 3000])
def test_values_that_are_not_finite(ops, device, n):
    rows = [[1, NAN, 0], [INF, 1, 0], [-INF] * 3, [-INF, 1, 1], [3e38, -3e38, 3e38], [-INF, 0, -9]]
    x = torch.full((6, n), -INF, device=device)
    x[:, :3] = torch.tensor(rows)
    p = ops.entmax15(x)
    assert p[:3].isnan().all()
    expected = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 1, 0]]
    torch.testing.assert_close(p[3:, :3], x.new_tensor(expected))
    assert (p[3:, 3:] == 0).all()
    # Other rows than those with NaN have gradients.
    assert (
        ops.entmax15_backward(torch.ones_like(p), p).isfinite().all(-1).tolist()
        == [0] * 3 + [1] * 3
    )


def test_shapes_and_strides(ops, device):
    x = torch.randn(4, 5, 6, device=device)
    torch.testing.assert_close(ops.entmax15(x)[2, 3], ops.entmax15(x[2, 3]))
    torch.testing.assert_close(ops.entmax15(x.mT), ops.entmax15(x.mT.contiguous()))
    p, grad = ops.entmax15(x), torch.randn(6, 5, 4, device=device).transpose(0, 2)
    expected = ops.entmax15_backward(grad.contiguous(), p)
    torch.testing.assert_close(ops.entmax15_backward(grad, p), expected)
    assert ops.entmax15(x[:0]).shape == (0, 5, 6)
    assert ops.entmax15_backward(grad[:0], p[:0]).shape == (0, 5, 6)


def test_rows_do_not_depend_on_the_number_of_threads():
    x = torch.randn(600, 100)
    expected = entmax15(x)
    torch.set_num_threads(3)
    try:
        assert torch.equal(entmax15(x), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize('function', [entmax15, reference.entmax15])
def test_gradients_by_finite_differences(function):
    x = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))


def test_third_derivative():
    """By the op and by the reference, on inputs with values outside the support."""
    x = torch.tensor([[0.3, 0.1, -0.6, -5.0]], dtype=torch.float64, requires_grad=True)
    results = []
    for function in (entmax15, reference.entmax15):
        y = function(x)[0, 0]
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad[0, 1]
        results.append(grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_opcheck(dtype):
    x = torch.randn(4, 5, 6, dtype=dtype, requires_grad=True)
    p, grad = entmax15(x).detach(), torch.randn_like(x)
    for strided in (x, x.mT):
        torch.library.opcheck(torch.ops.mmdet_moe.entmax15, (strided,))
    arguments = (grad.requires_grad_(), p.requires_grad_())
    torch.library.opcheck(torch.ops.mmdet_moe.entmax15_backward, arguments)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(8, 50, dtype=dtype, requires_grad=True)
    wide = x.detach().float().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):  # leaves it alone
        p, expected = entmax15(x), entmax15(wide)
    assert (p.dtype, expected.dtype) == (dtype, torch.float32)
    assert torch.equal(p, expected.to(dtype))
    p[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    assert torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_without_graph_breaks(dynamic):
    def function(x):
        return entmax15(x * 2).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend='aot_eager')
    for shape in ((3, 5), (2, 4, 7)):
        x = torch.randn(shape)
        results = []
        for f in (function, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            y.sum().backward()
            results.append((y, leaf.grad))
        torch.testing.assert_close(*results)


def test_shapes_without_data():
    p = entmax15(torch.zeros(7, 3, device='meta', dtype=torch.bfloat16))
    assert (p.shape, p.dtype) == ((7, 3), torch.bfloat16)


class Layer(torch.nn.Module):
    def forward(self, x):
        return entmax15(x * 2)


DYNAMIC = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
#: Rows with ties, a masked value and one that takes all, beside random ones.
X = torch.cat([torch.randn(3, 6), torch.tensor([[1.0] * 6, [0.0, -INF] * 3, [9.0, 0, 0, 0, 0, 0]])])


@pytest.mark.parametrize('strict', [False, True])
def test_export_needs_no_part_of_this_package(strict):
    program = torch.export.export(
        Layer(), (X.view(2, 3, 6),), dynamic_shapes=DYNAMIC, strict=strict
    )
    assert not any('mmdet_moe' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X.view(3, 2, 6)), Layer()(X.view(3, 2, 6)))


def test_onnx(tmp_path):
    import onnxruntime

    file = tmp_path / 'entmax.onnx'
    arguments = dict(dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    torch.onnx.export(Layer().eval(), (X.view(2, 3, 6),), file, **arguments)
    session = onnxruntime.InferenceSession(file)
    for x in (X[None], X.view(3, 2, 6)):
        (p,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(p, Layer()(x).numpy(), atol=1e-6)


def test_arguments_that_do_not_fit():
    for message, x in {
        'x must be a floating-point tensor of shape': torch.arange(3),
        r'at least one value along its last dimension, got shape \(\)': torch.tensor(1.0),
        r'at least one value along its last dimension, got shape \(2, 0\)': torch.zeros(2, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            entmax15(x)


def test_direct_calls_cannot_touch_memory_of_others():
    op, backward = torch.ops.mmdet_moe.entmax15, torch.ops.mmdet_moe.entmax15_backward
    p = torch.ones(3, 1)
    for call in (
        lambda: op(torch.zeros(2, 0)),
        lambda: op(torch.tensor(1.0)),
        lambda: backward(torch.ones(2, 5), p),
        lambda: backward(p.double(), torch.zeros(2, 0)),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()
