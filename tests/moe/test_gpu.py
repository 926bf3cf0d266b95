"""Layers on a GPU: the numbers of the CPU, streams, graphs, and how often the host waits."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.errors import NonFiniteRouterError
from mmdet_moe.moe import ConvExperts, CPMuMoE, LinearExperts, MLPExperts, MoELayer, routers
from research.benchmarks.harness import waits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')

C, E = 16, 4


def subnet():
    return nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(4, C), nn.ReLU(), nn.Conv2d(C, 12, 3, padding=1)
    )


def plain_subnet():
    """Without normalisation: all levels are computed together."""
    return nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, 12, 5, padding=4, dilation=2)
    )


def convs(impl):
    return ConvExperts(C, 12, 3, E, padding=1, impl=impl)


def moe(expert, **options):
    return MoELayer(expert, E, 2, in_channels=C, **options)


LAYERS = {
    'subnets': lambda: moe(subnet()),
    'subnets on sheets': lambda: moe(plain_subnet()),
    'subnets of a residual layer': lambda: moe(subnet(), shortcut=nn.Conv2d(C, 12, 1)),
    'subnets with a capacity': lambda: moe(subnet(), capacity_factor=0.75),
    'convolutions': lambda: moe(convs('auto')),
    'convolutions, grouped': lambda: moe(convs('grouped')),
    'convolutions, views': lambda: moe(convs('views')),
    'normalised levels': lambda: moe(subnet(), router={'normalise_levels': 3}),
    'whole maps': lambda: moe(subnet(), granularity='patch', grid_size=2, whole_maps=True),
    'patches': lambda: moe(convs('auto'), granularity='patch', grid_size=2),
    'pixels': lambda: moe(LinearExperts(C, 12, E), granularity='pixel'),
    'hard constraint': lambda: moe(
        subnet(), router={'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint'}}
    ),
}
TOKENS = {
    'linear': lambda: moe(LinearExperts(C, 24, E), granularity='token'),
    'MLP': lambda: moe(MLPExperts(C, 32, 24, E, activation='GELU'), granularity='token'),
    'μMoE': lambda: CPMuMoE(C, 24, num_experts=8, rank=6),
}


def levels(dtype, device, images=3):
    generator = torch.Generator().manual_seed(0)
    sizes = [(12, 9), (6, 5), (3, 3)]
    maps = [torch.randn(images, C, *s, generator=generator, dtype=torch.float64) for s in sizes]
    return [x.to(device, dtype).requires_grad_() for x in maps]


def run(layer, inputs, cotangents=None):
    """Outputs and the gradients of inputs and parameters."""
    torch.manual_seed(1)
    outputs = layer(inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    if cotangents is None:
        cotangents = [torch.rand(y.shape, dtype=y.dtype, device=y.device) - 0.5 for y in outputs]
    leaves = [*(inputs if isinstance(inputs, list) else [inputs]), *layer.parameters()]
    gradients = torch.autograd.grad(
        outputs, leaves, [c.to(y) for c, y in zip(cotangents, outputs, strict=True)],
        materialize_grads=True, allow_unused=True,
    )  # fmt: skip
    return outputs, list(gradients), cotangents


@pytest.mark.parametrize('name', LAYERS | TOKENS)
def test_equals_the_cpu(name, monkeypatch):
    """In float64, forward and backward, in training mode, but for the noise."""
    monkeypatch.setattr(routers, 'own_random', lambda draw, like: torch.zeros_like(like))
    on_cpu = (LAYERS | TOKENS)[name]().double()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    if name in TOKENS:
        inputs = torch.rand(2, 40, C, dtype=torch.float64).requires_grad_()
        same = inputs.detach().cuda().requires_grad_()
    else:
        inputs, same = levels(torch.float64, 'cpu'), levels(torch.float64, 'cuda')
    expected, grads, cotangents = run(on_cpu, inputs)
    actual, others, _ = run(on_gpu, same, cotangents)
    for a, b in zip([*actual, *others], [*expected, *grads], strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('trains', [False, True])
@pytest.mark.parametrize(
    ('name', 'most'),
    [
        ('subnets', 1),  # the bounds of the experts' rows, for all levels together
        ('subnets on sheets', 1),
        ('hard constraint', 1),
        ('normalised levels', 1),
        ('whole maps', 1),
        ('convolutions', 1),
        ('convolutions, grouped', 0),
    ],
)
def test_how_often_the_host_waits(name, most, trains):
    layer = LAYERS[name]().cuda().train(trains)
    inputs = levels(torch.float32, 'cuda')

    def step():
        outputs = layer(inputs)
        if trains:
            sum(y.sum() for y in outputs).backward()

    places = waits(step)
    assert len(places) <= most, places


def test_a_cuda_graph_computes_what_the_layer_does():
    layer = LAYERS['convolutions, grouped']().cuda().eval()
    inputs = [x.detach() for x in levels(torch.float32, 'cuda')]
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            layer(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = layer(inputs)
    for x in inputs:  # other images, other decisions
        x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.no_grad():
        expected = layer(inputs)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_two_streams_do_not_mix():
    """Two layers at the same time, each on a stream of its own, as often as races need to show."""
    layers = [LAYERS['subnets']().cuda().eval() for _ in range(2)]
    inputs = [[x.detach() + i for x in levels(torch.float32, 'cuda', 16)] for i in range(2)]
    with torch.no_grad():
        expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for _ in range(20):
            results = []
            for layer, x, stream in zip(layers, inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer(x))
            torch.cuda.synchronize()
            for one, other in zip(results, expected, strict=True):
                assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize('name', ['subnets', 'convolutions, grouped'])
def test_values_that_are_not_finite_are_found_at_the_latest_by_the_next_call(name):
    layer = LAYERS[name]().cuda().eval()
    inputs = [x.detach() for x in levels(torch.float32, 'cuda')]
    inputs[1][0, 0, 0, 0] = float('nan')

    def look():
        layer(inputs)
        layer.check_finite()

    with pytest.raises(NonFiniteRouterError, match='not finite'):
        look()
    layer([torch.zeros_like(x) for x in inputs])  # and then it is forgotten
    layer.check_finite()
