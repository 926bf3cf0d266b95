"""The three ways to convolve, against every expert on every item and against one another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ConvExperts, MoELayer, upcycle
from mmdet_moe.moe.dispatcher import Dispatcher, EveryExpert
from mmdet_moe.moe.experts.conv_cost import cheapest

IMPLS = ['subbatches', 'grouped', 'views', 'auto']
E = 4
GEOMETRIES = [
    {'kernel_size': 3, 'padding': 1},
    {'kernel_size': 1},
    {'kernel_size': 3, 'stride': 2, 'padding': 1, 'groups': 2},
    {'kernel_size': (3, 5), 'padding': (0, 2), 'dilation': (2, 1), 'bias': False},
    {'kernel_size': 3, 'padding': 'same', 'dilation': 2},
]


def build(impl, channels=(4, 6), **options):
    return ConvExperts(*channels, num_experts=E, impl=impl, **(options or GEOMETRIES[0])).double()


def routes(num_items, k, drop=0.0):
    ids = torch.rand(num_items, E).topk(k).indices
    weights = torch.rand(num_items, k, dtype=torch.float64)
    return ids, weights.masked_fill(torch.rand(num_items, k) < drop, 0)


def dense(experts, x, ids, weights, conv):
    """Each expert on each item, in PyTorch's own convolutions."""
    outputs = []
    for e in range(E):
        single = copy.deepcopy(conv)
        single.weight.data = experts.weight.data[e]
        if single.bias is not None:
            single.bias.data = experts.bias.data[e]
        outputs.append(single(x))
    outputs = torch.stack(outputs, 1)
    mixture = weights.new_zeros(len(x), E).scatter(1, ids, weights)
    return (mixture[:, :, None, None, None] * outputs).sum(1)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@pytest.mark.parametrize(('k', 'drop'), [(1, 0.0), (2, 0.0), (3, 0.4), (E, 1.0)])
def test_against_every_expert_on_every_item(impl, geometry, k, drop):
    experts = build(impl, **geometry)
    conv = nn.Conv2d(4, 6, **geometry).double()
    x = torch.randn(5, 4, 9, 8, dtype=torch.float64)
    ids, weights = routes(5, k, drop)
    y = experts(x, Dispatcher(ids, weights, E))
    torch.testing.assert_close(y, dense(experts, x, ids, weights, conv))


@pytest.mark.sweep(keep=1 / 2)
@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_gradients_by_finite_differences(impl, geometry):
    """For the input, the weights, the kernels and the biases; expert 3 is not used."""
    experts = build(impl, (2, 4), **geometry)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]])
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.5], [0.6, 0.4]]).double().requires_grad_()
    names, parameters = zip(*experts.named_parameters(), strict=True)

    def run(x, weights, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, values, (x, Dispatcher(ids, weights, E)))

    assert gradcheck(run, (x, weights, *parameters))


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('bias', [True, False])
def test_pixels_as_items(impl, bias):
    """1×1 kernels on 1×1 maps are matrix products; values and gradients of a convolution."""
    experts = build(impl, kernel_size=1, bias=bias)
    conv = nn.Conv2d(4, 6, 1, bias=bias).double()
    x = torch.randn(40, 4, 1, 1, dtype=torch.float64)
    ids, weights = routes(40, 2, 0.2)
    expected = dense(experts, x, ids, weights, conv)
    torch.testing.assert_close(experts(x, Dispatcher(ids, weights, E)), expected)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    grads = torch.autograd.grad(experts(x, Dispatcher(ids, weights, E)).square().sum(), leaves)
    mixture = weights.new_zeros(40, E).scatter(1, ids, weights.where(weights != 0, 0.0))
    every = torch.einsum('eoi,ti->teo', experts.weight.flatten(2), x.flatten(1))
    if bias:
        every = every + experts.bias
    y = torch.einsum('te,teo->to', mixture, every)
    torch.testing.assert_close(grads, torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize('frozen', ['weight', 'bias', 'x', 'weights', 'weight and weights'])
@pytest.mark.parametrize('impl', IMPLS)
def test_only_the_gradients_that_are_needed(impl, frozen):
    def run(impl, frozen):
        torch.manual_seed(0)
        experts = build(impl)
        ids, weights = routes(4, 2)
        leaves = {'x': torch.randn(4, 4, 5, 5).double(), 'weights': weights}
        leaves |= dict(experts.named_parameters())
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen.split(' and '))
        experts(leaves['x'], Dispatcher(ids, leaves['weights'], E)).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    free, some = run('subbatches', ''), run(impl, frozen)
    for name, gradient in some.items():
        if name in frozen.split(' and '):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, free[name])


@pytest.mark.parametrize('impl', IMPLS)
def test_no_items(impl):
    """No item at all, and items without any choice; every parameter still has a gradient."""
    layer = MoELayer(build(impl), E, 2, in_channels=4).double()
    y = layer(torch.zeros(0, 4, 7, 7, dtype=torch.float64))
    assert y.shape == (0, 6, 7, 7)
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.experts.parameters())
    ids, weights = routes(3, 2)
    y = build(impl)(torch.randn(3, 4, 7, 7).double(), Dispatcher(ids, weights * 0, E))
    assert torch.equal(y, torch.zeros(3, 6, 7, 7, dtype=torch.float64))


@pytest.mark.parametrize('impl', IMPLS)
def test_mixed_precision(impl):
    """Under autocast as PyTorch's convolution: bfloat16 out, float32 gradients for parameters."""
    experts = build(impl).float()
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    ids, weights = routes(4, 2)
    weights = weights.float().requires_grad_()
    expected = experts(x, Dispatcher(ids, weights, E))
    leaves = [x, weights, *experts.parameters()]
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    with torch.autocast('cpu', torch.bfloat16):
        y = experts(x, Dispatcher(ids, weights, E))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - reference).norm() < 0.03 * reference.norm()


def test_impls_agree_in_float32_on_larger_maps():
    ids, weights = routes(6, 2)
    x, experts, results = torch.randn(6, 4, 31, 40), build('auto').float(), []
    for experts.impl in IMPLS:
        results.append(experts(x, Dispatcher(ids, weights.float(), E)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_views_follow_a_dense_convolution_exactly():
    """With one expert and weight 1 nothing is mixed."""
    conv = nn.Conv2d(4, 6, 3, padding=1)
    experts = ConvExperts.like(conv, 1, impl='views')
    experts.weight.data[0], experts.bias.data[0] = conv.weight.data, conv.bias.data
    x = torch.randn(3, 4, 8, 8)
    one = Dispatcher(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 1)
    expected = torch.cat([conv(x[t : t + 1]) for t in range(3)])
    torch.testing.assert_close(experts(x, one), expected, rtol=0, atol=1e-6)


def test_initial_weights_are_those_of_convolutions():
    """Each expert's is its own draw, the one that ``nn.Conv2d`` would make in its place."""
    torch.manual_seed(3)
    experts = ConvExperts(4, 6, 3, num_experts=3)
    torch.manual_seed(3)
    for e in range(3):
        conv = nn.Conv2d(4, 6, 3)
        assert torch.equal(experts.weight[e], conv.weight)
        assert torch.equal(experts.bias[e], conv.bias)


def test_initialisation_by_mmengine():
    cfg = {'type': 'Normal', 'layer': 'Conv2d', 'mean': 5.0, 'std': 0.1, 'bias': 2.0}
    experts = ConvExperts(4, 6, 3, num_experts=3, init_cfg=cfg)
    experts.init_weights()
    assert (experts.weight.mean(dim=(1, 2, 3, 4)) - 5).abs().max() < 0.05
    assert (experts.bias == 2).all()
    assert not torch.equal(experts.weight[0], experts.weight[1])
    layer = MoELayer(copy.deepcopy(experts), 3, 2, in_channels=4, expert_init='shared')
    layer.init_weights()
    assert torch.equal(layer.experts.weight[0], layer.experts.weight[2])


def test_config_and_state_dict():
    config = {'type': 'mmdet_moe.ConvExperts', 'in_channels': 4, 'out_channels': 6}
    layer = MoELayer({**config, 'kernel_size': 3}, E, 2, in_channels=4)
    assert {n: tuple(v.shape) for n, v in layer.experts.state_dict().items()} == {
        'weight': (E, 6, 4, 3, 3),
        'bias': (E, 6),
    }


def test_config_by_class_and_contradicting_numbers():
    layer = MoELayer(
        {'type': ConvExperts, 'in_channels': 4, 'out_channels': 6, 'kernel_size': 3},
        E,
        2,
        in_channels=4,
    )
    assert layer.experts.weight.shape == (E, 6, 4, 3, 3)
    config = {'type': 'mmdet_moe.ConvExperts', 'in_channels': 4, 'out_channels': 6}
    with pytest.raises(ConfigError, match=r'expert.num_experts=8 contradicts .* num_experts=4'):
        MoELayer({**config, 'kernel_size': 3, 'num_experts': 8}, E, 2, in_channels=4)
    with pytest.raises(ConfigError, match='num_experts=0: there must be at least 1 expert'):
        ConvExperts(4, 6, 3, num_experts=0)
    with pytest.raises(ConfigError, match='type=ConvExperts computes feature maps'):
        MoELayer(ConvExperts(4, 6, 1, E), E, 2, in_channels=4, granularity='token')


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('granularity', ['image', 'patch'])
def test_channels_last(impl, granularity):
    """Of a whole model; values, gradients and the kernels' layout are those of contiguous maps."""
    options = {'granularity': 'patch', 'grid_size': 2} if granularity == 'patch' else {}
    plain = MoELayer(build(impl), E, 2, in_channels=4, **options).double().eval()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert torch.equal(model.experts.weight, plain.experts.weight)
    x, results = torch.randn(3, 4, 7, 8).double(), []
    for layer, layout in ((plain, torch.contiguous_format), (model, torch.channels_last)):
        maps = x.clone(memory_format=layout).requires_grad_()
        y = layer(maps)
        assert y.is_contiguous(memory_format=layout)
        y.square().sum().backward()
        results.append((y, maps.grad, *(p.grad for p in layer.parameters())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('most_bytes', [0, 1 << 20])
def test_channels_last_in_one_graph(most_bytes, monkeypatch):
    """By every expert on every item, and by mixed kernels."""
    monkeypatch.setattr('mmdet_moe.moe.experts.conv.MOST_MIXED_BYTES', most_bytes)
    experts, (ids, weights) = build('auto'), routes(3, 2)
    x = torch.randn(3, 4, 7, 8).double().to(memory_format=torch.channels_last)
    y = experts(x, EveryExpert(ids, weights, E))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, experts(x, Dispatcher(ids, weights, E)))


@pytest.mark.parametrize('impl', IMPLS)
def test_float64_stays_under_autocast(impl):
    ids, weights = routes(3, 2)
    with torch.autocast('cpu', torch.bfloat16):
        y = build(impl)(torch.randn(3, 4, 6, 6).double(), Dispatcher(ids, weights, E))
    assert y.dtype == torch.float64


@pytest.mark.parametrize('impl', IMPLS)
def test_an_expert_that_is_chosen_twice(impl):
    experts, x = build(impl), torch.randn(2, 4, 6, 6).double()
    ids, weights = torch.tensor([[1, 1], [2, 0]]), torch.tensor([[0.25, 0.5], [1.0, 2.0]]).double()
    merged = torch.tensor([[0.75, 0.0], [1.0, 2.0]]).double()
    expected = experts(x, Dispatcher(torch.tensor([[1, 0], [2, 0]]), merged, E))
    torch.testing.assert_close(experts(x, Dispatcher(ids, weights, E)), expected)


def test_dense_checkpoints_and_lists_of_experts_load():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = MoELayer(ConvExperts.like(conv, E), E, 2, in_channels=4)
    layer.load_state_dict(conv.state_dict(), strict=False)
    for e in range(E):
        assert torch.equal(layer.experts.weight[e], conv.weight)
        assert torch.equal(layer.experts.bias[e], conv.bias)
    listed = MoELayer(conv, E, 2, in_channels=4)
    layer.load_state_dict(listed.state_dict())  # strict
    for e, expert in enumerate(listed.experts):
        assert torch.equal(layer.experts.weight[e], expert.weight)
    x = torch.randn(5, 4, 7, 7)
    torch.testing.assert_close(layer.eval()(x), listed.eval()(x), rtol=1e-5, atol=1e-5)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))  # strict
    with pytest.raises(ConfigError, match=r'has 3 experts .* but the model has 4'):
        layer.load_state_dict(MoELayer(conv, 3, 2, in_channels=4).state_dict())
    state = MoELayer(conv, 3, 2, in_channels=4).state_dict()
    before = dict(state)
    with pytest.raises(ConfigError):
        upcycle(state, '', '', layer.experts, 0)
    assert state.keys() == before.keys()  # nothing was converted
    fewer = MoELayer(ConvExperts.like(conv, 3), 3, 2, in_channels=4)
    with pytest.raises(ConfigError, match=r'has 3 experts .* but the model has 4'):
        layer.load_state_dict(fewer.state_dict())


@pytest.mark.parametrize('impl', IMPLS)
def test_patches_see_their_neighbours(impl):
    """Patch granularity needs the receptive field of the stacked kernels."""
    experts = build(impl, kernel_size=5, padding=2)
    assert experts.receptive_field(4) == (2, 1)
    layer = MoELayer(experts, E, E, in_channels=4, granularity='patch', grid_size=3).double().eval()
    x = torch.randn(2, 4, 13, 11, dtype=torch.float64)
    y = layer(x)
    outputs = [
        F.conv2d(x, w, b, padding=2) for w, b in zip(experts.weight, experts.bias, strict=True)
    ]
    weights = layer.routing.dense_weights().view(2, 3, 3, E)
    for n, i, j in ((0, 0, 0), (1, 1, 2), (0, 2, 1)):
        top, left = i * 13 // 3, j * 11 // 3
        here = (n, slice(None), top, left)
        expected = sum(w * o[here] for w, o in zip(weights[n, i, j], outputs, strict=True))
        torch.testing.assert_close(y[here], expected)


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_output_size(geometry):
    experts, conv = build('auto', **geometry), nn.Conv2d(4, 6, **geometry)
    for size in ((9, 8), (16, 5)):
        assert experts.output_size(size) == tuple(conv(torch.zeros(1, 4, *size)).shape[2:])


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('k', [1, 2, E])
@pytest.mark.parametrize(('kernel_size', 'granularity'), [(3, 'image'), (1, 'pixel')])
def test_active_flops(impl, k, kernel_size, granularity):
    """k convolutions count as k, also where mixed kernels or a grouped product compute less or
    what PyTorch does not count: `auto` takes another way on another device."""
    pytest.importorskip('mmpretrain')
    from mmdet_moe.moe.flops import count_flops

    experts = ConvExperts(8, 8, kernel_size, E, padding='same', impl=impl)
    layer = MoELayer(experts, E, k, in_channels=8, granularity=granularity)
    pixels = 6 * 5
    router = 2 * 8 * E * (pixels if granularity == 'pixel' else 1)
    one = 2 * 8 * 8 * kernel_size**2 * pixels
    assert count_flops(layer, torch.randn(1, 8, 6, 5)) == k * one + router
    assert experts.impl == impl


def choice(num_items, channels, size, k, num_experts, kernel_size=3, trains=False):
    """What auto decides for a layer of these sizes, whose kernels are not in memory."""
    with torch.device('meta'):
        experts = ConvExperts(channels, channels, kernel_size, num_experts, padding='same')
    ids = torch.rand(num_items, num_experts).topk(k).indices
    dispatcher = Dispatcher(ids, torch.rand(num_items, k), num_experts)
    x = torch.empty(1).expand(num_items, channels, size, size).requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        return cheapest(experts, x, dispatcher)


def test_auto_follows_the_measurements():
    """Clear cases of the measurements (milliseconds on 2 cores)."""
    for trains in (False, True):
        # Single pixels are not worth a kernel each.
        assert choice(64, 256, 1, 2, 4, trains=trains) == 'subbatches'
        assert choice(20000, 64, 1, 2, 8, kernel_size=1, trains=trains) == 'subbatches'
        # 16 x 256 x 32 x 32: mixing halves the FLOPs (75 against 174 in sub-batches).
        assert choice(16, 256, 32, 2, 8, trains=trains) != 'subbatches'
        # 64 x 64 x 32 x 32: one grouped convolution (16) beats 64 single ones (18).
        assert choice(64, 64, 32, 2, 10, trains=trains) == 'grouped'
    # 32 x 128 x 16 x 16, E = 256: the gradients of all kernels in one product take longer (71
    # against 37), the mixing does not (10 and 10).
    assert choice(32, 128, 16, 2, 512, trains=True) == 'views'


def test_auto_in_bfloat16():
    """Clear cases of the measurements (milliseconds on one core), tensors and autocast alike."""
    with torch.autocast('cpu', dtype=torch.bfloat16):
        # 64 x 64 x 64 x 64, 1 x 1: 139 against 301 in sub-batches and 933 grouped.
        assert choice(64, 64, 64, 2, 8, kernel_size=1, trains=True) == 'views'
        # 8 x 256 x 8 x 8: 166 against 26 in sub-batches and 33 grouped.
        assert choice(8, 256, 8, 2, 8, trains=True) != 'views'
    assert choice(64, 64, 64, 2, 8, kernel_size=1, trains=True) == 'grouped'
    half = ConvExperts(64, 64, 1, 8, impl='auto').bfloat16()
    dispatcher = Dispatcher(torch.arange(128).view(64, 2) % 8, torch.ones(64, 2), 8)
    assert cheapest(half, torch.empty(64, 64, 64, 64, dtype=torch.bfloat16), dispatcher) == 'views'


def test_auto_with_channels_last():
    """Clear cases of the measurements (milliseconds on one core)."""
    dispatcher = Dispatcher(torch.arange(32).view(32, 1) % 8, torch.ones(32, 1), 8)
    maps = torch.empty(32, 128, 32, 32).to(memory_format=torch.channels_last)
    experts = ConvExperts(128, 128, 3, 8, padding=1).requires_grad_(False)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        # 18 against 25 in views and 66 grouped, whose maps are copied to another format and back.
        assert cheapest(experts, maps, dispatcher) == 'subbatches'
        assert cheapest(experts, maps.contiguous(), dispatcher) == 'grouped'
    # 8 x 128 x 64 x 64, 1 x 1: 14 against 32 in sub-batches and 33 grouped.
    dispatcher = Dispatcher(torch.arange(16).view(8, 2) % 8, torch.ones(8, 2), 8)
    maps = torch.empty(8, 128, 64, 64).to(memory_format=torch.channels_last)
    assert cheapest(ConvExperts(128, 128, 1, 8).requires_grad_(False), maps, dispatcher) == 'views'


def test_auto_does_not_fill_the_memory():
    """Mixed kernels of 512 items of 512 channels would take 4.8 GB."""
    assert choice(64, 512, 32, 2, 4) in ('grouped', 'views')
    assert choice(512, 512, 64, 4, 4) == 'views'


@pytest.mark.parametrize('kind', ['Conv', 'Conv2d'])
def test_like_a_plain_convolution(kind):
    """mmcv's wrapper computes what PyTorch's does."""
    cnn = pytest.importorskip('mmcv.cnn')
    conv = cnn.build_conv_layer({'type': kind}, 4, 6, 3, stride=2, padding=1)
    experts = ConvExperts.like(conv, 1)
    experts.weight.data[0], experts.bias.data[0] = conv.weight.data, conv.bias.data
    x = torch.randn(2, 4, 7, 7)
    one = Dispatcher(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1)
    torch.testing.assert_close(experts(x, one), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', ['Conv2dAdaptivePadding', 'ConvWS'])
def test_like_a_convolution_with_more_to_it(kind):
    """Padding by the size of the input, standardised weights: the kernels alone are not all."""
    cnn = pytest.importorskip('mmcv.cnn')
    conv = cnn.build_conv_layer({'type': kind}, 4, 6, 3)
    with pytest.raises(ConfigError, match=rf'conv_cfg: {type(conv).__name__} is not supported'):
        ConvExperts.like(conv, 2)


def test_wrong_options():
    with pytest.raises(ConfigError, match="impl='fast' is unknown; use one of"):
        build('fast')
    with pytest.raises(ConfigError, match="padding_mode='reflect' is not supported"):
        ConvExperts.like(nn.Conv2d(2, 2, 3, padding_mode='reflect'), 2)
    with pytest.raises(ConfigError, match="padding='same' needs odd kernel sizes"):
        build('auto', kernel_size=4, padding='same')
