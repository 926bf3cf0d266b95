"""torch.compile against the layer as it is, with and without breaks of the graph."""

import os
import shutil
from itertools import product

import mumoe_by_hand as by_hand
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mmdet_moe.errors import ConfigError, NonFiniteRouterError
from mmdet_moe.moe import (
    ConvExperts,
    CPMuMoE,
    LinearExperts,
    MLPExperts,
    MoELayer,
    MuMoEConv1x1,
    MuMoEMLP,
    TRMuMoE,
)

C, E = 8, 4
MAPS, TOKENS = (4, C, 6, 6), (4, 5, C)


def layer(expert, **options):
    router = {'noise': False, 'init_std': 2.0, **options.pop('router', {})}
    return MoELayer(expert, E, 2, router, in_channels=C, **options)


def conv():
    return nn.Conv2d(C, C, 3, padding=1)


def subnet():
    return nn.Sequential(conv(), nn.GroupNorm(2, C), nn.ReLU(inplace=True), conv())


class Levels(nn.Module):
    def __init__(self, built):
        super().__init__()
        self.layer = built

    def forward(self, x):
        return torch.cat([y.flatten(1) for y in self.layer([x, -3 * x[:, :, ::2, ::2]])], dim=1)


CASES = {
    'modules': (lambda: layer(subnet()), MAPS),
    'two levels': (lambda: Levels(layer(subnet(), shared=[conv()])), MAPS),
    'convolutions': (lambda: layer(ConvExperts(C, C, 3, E, padding=1)), MAPS),
    'patches': (lambda: layer(conv(), granularity='patch', grid_size=2), MAPS),
    'whole maps': (lambda: layer(subnet(), granularity='pixel', whole_maps=True), MAPS),
    'linear': (lambda: layer(LinearExperts(C, C, E), granularity='token'), TOKENS),
    'tokens, modules': (lambda: layer(nn.Linear(C, C), granularity='token'), TOKENS),
    'mlp': (lambda: layer(MLPExperts(C, 16, C, E), granularity='pixel'), MAPS),
    'bounded': (lambda: layer(LinearExperts(C, C, E), granularity='token', capacity_factor=1.0),
                TOKENS),
    'hard constraint': (
        lambda: layer(conv(), router={'constraint': {
            'type': 'mmdet_moe.RelativeImportanceConstraint'
        }}),
        MAPS,
    ),
    'factors': (lambda: by_hand.randomise(CPMuMoE(C, C, (E, 3), 3)), TOKENS),
    'factors, ring': (lambda: by_hand.randomise(TRMuMoE(C, C, E, 3, norm='ln')), TOKENS),
    'factors, pixels': (lambda: by_hand.randomise(MuMoEConv1x1(C, C, E, 3, stride=2)), MAPS),
    'factors, mlp': (
        lambda: by_hand.randomise(MuMoEMLP(C, 8, C, (E, 3), 2, factorisation='tr')), TOKENS
    ),
}  # fmt: skip


def results(built, run, x):
    """The output, and in training all gradients and states."""
    built.zero_grad()
    x = x.clone().requires_grad_(built.training)
    y = run(x)
    if not built.training:
        return [y]
    y.square().sum().backward()
    # Those without a gradient have none to compare: what the router's own noise is scaled with.
    grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in built.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in built.buffers())]


def compare(built, run, inputs):
    initial = {name: value.clone() for name, value in built.state_dict().items()}
    found = []
    for compute in (built, run):
        built.load_state_dict(initial)
        with torch.set_grad_enabled(built.training):
            found.append([results(built, compute, x) for x in inputs])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.sweep(keep=1 / 3, each=('training',))
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('name', CASES)
def test_one_graph(name, training):
    """Equal results, and nothing is compiled anew for other decisions."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, shape = CASES[name]
    built = build().train(training)
    compiled = torch.compile(built, fullgraph=True, backend='aot_eager')
    inputs = [torch.randn(shape) * (i + 1) - 0.4 * i for i in range(3)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(built, compiled, inputs)


@pytest.mark.sweep(keep=1 / 3, each=('training',))
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('name', CASES)
def test_with_breaks(name, training):
    """One break, for what depends on the decision, with which nothing is compiled anew."""
    torch._dynamo.reset()
    counters.clear()
    build, shape = CASES[name]
    built = build().train(training)
    inputs = [torch.randn(shape) * (i + 1) - 0.4 * i for i in range(3)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(built, torch.compile(built, backend='aot_eager'), inputs)
    # A break is one of the caller, too.
    expected = 0 if 'factors' in name else {'two levels': 2}.get(name, 1)
    assert sum(counters['graph_break'].values()) == expected


@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_factors_of_any_batch(training):
    """One graph for batches of several sizes."""
    torch._dynamo.reset()
    build, shape = CASES['factors, mlp']
    built = build().train(training)
    compiled = torch.compile(built, fullgraph=True, dynamic=True, backend='aot_eager')
    inputs = [torch.randn(size, *shape[1:]) for size in (shape[0], 3)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(built, compiled, inputs)


def cases_of_the_default_backend():
    """Kind of experts, whether in one graph, and whether in training."""
    quick = {
        ('small modules', False, False),
        ('convolutions', True, True),
        ('mlp', True, False),
        ('factors', True, True),
    }
    for case in product(sorted({name for name, *_ in quick}), (False, True), (False, True)):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.sweep(keep=0))


@pytest.mark.skipif(
    shutil.which(os.environ.get('CXX', 'g++')) is None,
    reason='there is no C++ compiler (g++ or CXX) for the default backend',
)
@pytest.mark.parametrize(('name', 'fullgraph', 'training'), cases_of_the_default_backend())
def test_default_backend(name, fullgraph, training):
    """Its C++ is compiled, whatever the layer is called."""
    torch._dynamo.reset()
    build, shape = CASES.get(name) or (lambda: layer(conv()), MAPS)
    built = build().train(training)
    built.name = 'a "b" \\ c\n'
    compiled = torch.compile(built, fullgraph=fullgraph)
    compare(built, compiled, [torch.randn(shape)])
    if name == 'factors':
        return
    x = torch.full(shape, float('nan'), requires_grad=training)
    message = r'(?s)The router of MoE layer .*a.*c.* produced values that are not finite;'
    error = RuntimeError if fullgraph else NonFiniteRouterError
    with torch.set_grad_enabled(training), pytest.raises(error, match=message):
        compiled(x)


@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_compiled_experts(training):
    """By themselves: for one item, and for any number of several."""
    torch._dynamo.reset()
    counters.clear()
    built, by_itself = layer(subnet()).train(training), layer(subnet()).train(training)
    by_itself.load_state_dict(built.state_dict())
    for expert in built.experts:
        expert.compile(dynamic=True, backend='aot_eager')
    compiled = torch.compile(built, backend='aot_eager')
    with torch.set_grad_enabled(training):
        for i in range(12):
            x = torch.randn(MAPS) * (i % 3 + 1) - 0.4 * i
            found = results(built, compiled, x)
            expected = results(by_itself, by_itself, x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counters['stats']['unique_graphs'] < 6


def test_batch_statistics():
    """Refused in one graph, where they would be those of all items, not of the expert's own."""
    torch._dynamo.reset()
    built = layer(nn.Sequential(conv(), nn.BatchNorm2d(C)))
    compare(built, torch.compile(built, backend='aot_eager'), [torch.randn(MAPS)])
    compiled = torch.compile(built, fullgraph=True, backend='aot_eager')
    with pytest.raises((ConfigError, RuntimeError), match='hold BN in training mode'):
        compiled(torch.randn(MAPS))


@pytest.mark.parametrize(
    ('fullgraph', 'error'), [(True, RuntimeError), (False, NonFiniteRouterError)]
)
def test_values_that_are_not_finite(fullgraph, error):
    """They are told before the constraint counts them."""
    torch._dynamo.reset()
    built = CASES['hard constraint'][0]()
    compiled = torch.compile(built, fullgraph=fullgraph, backend='aot_eager')
    with pytest.raises(error, match='produced values that are not finite'):
        compiled(torch.full(MAPS, float('nan')))
    assert not built.router.constraint.relative_importance.any()
