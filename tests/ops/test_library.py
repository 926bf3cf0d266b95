"""The registered ops: gradients, shapes, autocast, compilation, and the checks of the functions."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from mmdet_moe.ops import combine, dispatch, native, reference, sort_routes

LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x[..., None].contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
}


@pytest.fixture(params=['reference', 'native'])
def kernels(request):
    """What serves the CPU."""
    is_native = native.is_native(torch.device('cpu'))
    if request.param == 'native' and not is_native:
        pytest.skip('there are no compiled kernels for the CPU')
    library = torch.library.Library('mmdet_moe', 'IMPL')
    if request.param == 'reference' and is_native:
        for name in ('sort_routes', 'dispatch', 'dispatch_backward', 'combine', 'combine_backward'):
            library.impl(name, getattr(reference, name), 'CPU')
    yield
    del library  # and with it, what it registered


def example(dtype=torch.float64, drop=True):
    """Items, rows, weights that require gradients, and the routes of 5 items to 2 of 4 experts."""
    ids = torch.tensor([[2, 0], [0, 1], [2, 1], [3, -1 if drop else 0], [1, 3]])
    offsets, inverse = sort_routes(ids, 4)
    num_rows = int(offsets[-1])
    x = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    y = torch.randn(num_rows, 2, 3, dtype=dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(5, 2, dtype=wide, requires_grad=True)
    return ids, num_rows, inverse, x, y, weights


@pytest.mark.parametrize('drop', [False, True])
def test_gradients_by_finite_differences(drop):
    _, num_rows, inverse, x, y, weights = example(drop=drop)
    assert gradcheck(lambda x: dispatch(x, inverse, num_rows), (x,))
    assert gradcheck(lambda y, w: combine(y, w, inverse), (y, weights))
    backward = torch.ops.mmdet_moe.dispatch_backward
    assert gradcheck(lambda g: backward(g, inverse), (y,))


@pytest.mark.sweep(keep=1 / 3, each=('kernels',))
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(kernels, dtype, layout):
    """PyTorch's own checks of schema, autograd registration, fake kernels and AOT dispatch."""
    ids, num_rows, inverse, x, y, weights = example(dtype)
    ops = torch.ops.mmdet_moe
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    x, y, grad = (
        LAYOUTS[layout](t.detach()).requires_grad_(t.requires_grad)
        for t in (x, y, torch.randn_like(x))
    )
    wide = weights.detach()
    if layout != 'contiguous':
        wide = wide.T.contiguous().T
    for op, arguments in (
        (ops.sort_routes, (ids, 4)),
        (ops.dispatch, (x, inverse, num_rows)),
        (ops.dispatch_backward, (y, inverse)),
        (ops.combine, (y, wide.requires_grad_(), inverse)),
        (ops.combine_backward, (grad, y.detach(), wide.detach(), inverse)),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)
        torch.library.opcheck(op, arguments, test_utils='test_aot_dispatch_dynamic')


def test_weights_may_have_another_dtype():
    """Routers compute in float32 whatever the experts do; gradients come back in their dtypes."""
    _, _, inverse, _, y, weights = example(torch.float32)
    for rows_dtype in (torch.float64, torch.bfloat16):
        for weights_dtype in (torch.float64, torch.float32, torch.bfloat16):
            rows = y.detach().to(rows_dtype).requires_grad_()
            w = weights.detach().to(weights_dtype).requires_grad_()
            total = combine(rows, w, inverse)
            total.sum().backward()
            assert total.dtype == rows.grad.dtype == rows_dtype
            assert w.grad.dtype == weights_dtype
            expected = reference.combine(rows.double(), w.double(), inverse)
            torch.testing.assert_close(total.double(), expected, rtol=0.01, atol=0.01)


def test_autocast_leaves_the_rows_as_they_are():
    _, num_rows, inverse, x, y, weights = example(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert dispatch(x, inverse, num_rows).dtype == torch.float32
        assert dispatch(x.bfloat16(), inverse, num_rows).dtype == torch.bfloat16
        total = combine(y.bfloat16(), weights, inverse)
        assert total.dtype == torch.bfloat16
        assert combine(y, weights, inverse).dtype == torch.float32
    total.sum().backward()
    assert weights.grad.dtype == torch.float32


def test_second_derivatives():
    """Dispatch is linear; combine says that it has none."""
    _, num_rows, inverse, x, y, weights = example()
    rows = dispatch(x, inverse, num_rows)
    (grad,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    kept = (inverse < num_rows).sum(1).double()
    torch.testing.assert_close(second, 2 * kept.view(5, 1, 1).expand_as(x))
    total = combine(y, weights, inverse).square().sum()
    (grad,) = torch.autograd.grad(total, y, create_graph=True)
    with pytest.raises(RuntimeError, match='combine has no second derivative'):
        grad.sum().backward()


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_without_graph_breaks(dynamic):
    """Also when the number of rows is known to the device only."""

    def layer(x, ids, weights):
        offsets, inverse = sort_routes(ids, 4)
        rows = dispatch(x * 2, inverse, inverse.numel())
        return combine(rows.relu(), weights, inverse), offsets

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend='aot_eager')
    for num_items in (5, 9):
        ids = torch.stack([torch.randperm(4)[:2] for _ in range(num_items)])
        inputs = [
            (torch.randn(num_items, 3, requires_grad=True), torch.rand(num_items, 2))
            for _ in range(2)
        ]
        inputs[1][0].data.copy_(inputs[0][0].data)
        results = []
        for function, (x, _) in zip((layer, compiled), inputs, strict=True):
            y, offsets = function(x, ids, inputs[0][1])
            y.sum().backward()
            results.append((y, offsets, x.grad))
        torch.testing.assert_close(*results)


def test_shapes_without_data():
    ids = torch.zeros(7, 2, dtype=torch.int64, device='meta')
    offsets, inverse = sort_routes(ids, 5)
    assert (offsets.shape, inverse.shape) == ((6,), (7, 2))
    rows = dispatch(torch.zeros(7, 3, 4, device='meta', dtype=torch.bfloat16), inverse, 13)
    assert (rows.shape, rows.dtype) == ((13, 3, 4), torch.bfloat16)
    total = combine(rows, torch.zeros(7, 2, device='meta'), inverse)
    assert (total.shape, total.dtype) == ((7, 3, 4), torch.bfloat16)


@pytest.mark.parametrize(
    'ids', [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4, 2).int()]
)
def test_sort_routes_refuses_other_tensors(ids):
    with pytest.raises(ValueError, match='expert_ids must be an int64 tensor of shape'):
        sort_routes(ids, 3)


def test_arguments_that_do_not_fit():
    _, num_rows, inverse, x, y, weights = example(torch.float32)
    meta = weights.detach().to('meta')
    for message, call in {
        'num_experts must be at least 1, got 0': lambda: sort_routes(inverse, 0),
        'x must have at least one dimension': lambda: dispatch(
            torch.tensor(1.0), inverse, num_rows
        ),
        'inverse must be an int64 tensor of shape': lambda: dispatch(x, inverse.int(), num_rows),
        'inverse has routes of 5 items, but x has 3': lambda: dispatch(x[:3], inverse, 5),
        'num_rows must be between 0 and the 10 .*, got -1': lambda: dispatch(x, inverse, -1),
        'num_rows must be between 0 and the 10 .*, got 11': lambda: dispatch(x, inverse, 11),
        'inverse is on meta, but x on cpu; move both': lambda: dispatch(x, inverse.to('meta'), 9),
        'y must be a floating-point tensor': lambda: combine(y.long(), weights, inverse),
        'inverse must be an int64 tensor': lambda: combine(y, weights, inverse[:, 0]),
        r'weights must be .* of shape \(5, 2\), as inverse': lambda: combine(
            y, weights.t(), inverse
        ),
        'weights is on meta, but y on cpu': lambda: combine(y, meta, inverse),
        'y has 18 rows, but inverse has only 10 positions': lambda: combine(
            torch.cat([y, y]), weights, inverse
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize('ops', ['native'], indirect=True)
def test_direct_calls_cannot_touch_memory_of_others(ops, device):
    """Arguments that the public functions do not see as wrong, or do not get to see."""
    if device.type == 'cuda':
        pytest.skip('a device-side assertion ends the process')
    _, num_rows, inverse, x, y, weights = example(torch.float32)
    for positions, count in (
        (inverse - 1, num_rows),
        (inverse.int(), num_rows),
        (inverse[:4], num_rows),
        (inverse, 11),
        (inverse, -1),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            ops.dispatch(x, positions, count)
    with pytest.raises((RuntimeError, IndexError)):
        ops.dispatch_backward(y, inverse - 1)
    with pytest.raises((RuntimeError, IndexError)):
        ops.combine(y, weights, inverse - 1)
    with pytest.raises((RuntimeError, IndexError)):
        ops.combine_backward(x, y, weights, inverse - 1)
    for wrong in (-2, 4, 1 << 40):
        with pytest.raises(RuntimeError, match='expert_ids'):
            ops.sort_routes(torch.tensor([[0, wrong]]), 4)


def test_dispatch_refuses_rows_that_nobody_writes():
    """On a CPU, which counts them."""
    _, num_rows, inverse, x, _, _ = example(torch.float32)
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.mmdet_moe.dispatch(x, inverse + 1, num_rows)


@pytest.mark.parametrize('shape', [(5, 3, 4), (5, 1, 4), (5, 1, 1), (5, 2, 3, 4), (5, 4)])
@pytest.mark.parametrize('order', ['last', 'reversed'])
def test_dense_layouts_stay(shape, order):
    """Values and gradients those of contiguous items, bit for bit; so for their shapes alone."""
    _, inverse = sort_routes(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
    x, weights = torch.randn(3, *shape), torch.rand(3, 2)
    in_memory = [0, *range(2, x.dim()), 1] if order == 'last' else [0, *range(x.dim() - 1, 0, -1)]
    back = torch.tensor(in_memory).argsort().tolist()

    def layer(x, weights, inverse):
        rows = dispatch(x, inverse, 6)
        return rows, combine(rows.tanh(), weights, inverse)

    results = []
    for dimensions in (range(x.dim()), in_memory):
        items = x.permute(in_memory).contiguous().permute(back) if results else x.clone()
        rows, y = layer(items.requires_grad_(), weights, inverse)
        with FakeTensorMode() as mode:
            fakes = layer(*map(mode.from_tensor, (items, weights, inverse)))
        for moved in (rows, y, *fakes):
            assert moved.permute(*dimensions).is_contiguous()
        results.append((rows, y, *torch.autograd.grad(y.square().sum(), items)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings('ignore')  # about what is traced
def test_registered_and_eager_gradients_agree():
    """The public functions pass by the registered autograd, but not where something is traced."""
    _, num_rows, inverse, x, _, weights = example()
    ops = torch.ops.mmdet_moe

    def layer(dispatch, combine):
        return lambda x, w: combine(dispatch(x, inverse, num_rows).square(), w, inverse)

    eager, registered = layer(dispatch, combine), layer(ops.dispatch, ops.combine)
    results = []
    for function in (eager, registered):
        y = function(x, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weights))))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(eager(x, weights), results[0][0])
    traced = torch.jit.trace(eager, (x, weights), check_trace=False)
    assert {'mmdet_moe::dispatch', 'mmdet_moe::combine'} <= {n.kind() for n in traced.graph.nodes()}
