"""``MoELayer`` for options drawn at random, against a dense layer written on its own.

The reference computes every expert on every item in float64 with plain sums, and its gradients come
from autograd through these sums. It shares no code with the package.
"""

import gc
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from mmdet_moe.errors import NonFiniteRouterError
from mmdet_moe.moe import ModuleExperts, MoELayer

C = 3
CONSTRAINTS = {
    'relative': {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.2},
    'mean': {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 0.05},
    'bias': {'type': 'mmdet_moe.BiasBalancing', 'update_rate': 0.05},
}
EXPERTS = {
    'modules': lambda num, out: [nn.Conv2d(C, out, 1) for _ in range(num)],
    'conv': lambda num, out: {
        'type': 'mmdet_moe.ConvExperts',
        'num_experts': num,
        'in_channels': C,
        'out_channels': out,
        'kernel_size': 1,
    },
    'linear': lambda num, out: {
        'type': 'mmdet_moe.LinearExperts',
        'num_experts': num,
        'in_features': C,
        'out_features': out,
    },
}


def of_kind(layer):
    """Weight (E, O, C) and bias (E, O) of the experts, whatever their kind."""
    experts = layer.experts
    if isinstance(experts, nn.ModuleList):
        weights = torch.stack([expert.weight for expert in experts])
        return weights.flatten(2), torch.stack([expert.bias for expert in experts])
    weight = experts.weight
    return (weight.flatten(2) if weight.dim() > 3 else weight), experts.bias


class Reference:
    """What the layer should do, in float64; the state of the constraint goes along."""

    def __init__(self, layer, options):
        self.options = options
        router, (weight, bias) = layer.router, of_kind(layer)
        self.numbers = {
            name: value.detach().double().clone().requires_grad_()
            for name, value in {
                'router': router.fc.weight,
                'router bias': router.fc.bias,
                'weight': weight,
                'bias': bias,
            }.items()
        }
        self.state = torch.zeros(router.num_experts, dtype=torch.float64)
        self.batches = 0

    def items(self, x):
        """Item of each pixel (N, H, W), and the number of them."""
        n, _, h, w = x.shape
        image = torch.arange(n)[:, None, None].expand(n, h, w)
        if self.options['granularity'] == 'image':
            return image, n
        if self.options['granularity'] == 'pixel':
            return torch.arange(n * h * w).view(n, h, w), n * h * w
        # Cells as those of adaptive pooling, of which maps smaller than the grid have fewer.
        rows, columns = min(self.options['grid'], h), min(self.options['grid'], w)
        cell = (torch.arange(h) * rows // h)[:, None] * columns + torch.arange(w) * columns // w
        return image * rows * columns + cell, n * rows * columns

    def __call__(self, x, training):
        x = x.double()
        num, k = self.options['num_experts'], self.options['top_k']
        item, total = self.items(x)
        pixels = x.movedim(1, -1).reshape(-1, C)
        member = F.one_hot(item.flatten(), total).double()
        pooled = member.T @ pixels / member.sum(0)[:, None]
        logits = pooled @ self.numbers['router'].T + self.numbers['router bias']
        values = logits.detach().clone()
        kind = self.options['constraint']
        if kind == 'bias':
            values = values.softmax(1) + self.state
        elif kind and training:
            limit = 0.2 if kind == 'relative' else 1 / num + 0.05
            mask = self.state > limit
            mask[self.state.argmin()] = False
            values[:, mask] = -math.inf
        # Decisions that rounding could turn are no test.
        ordered = values.sort(1, descending=True).values
        if k < num:
            assume(bool(((ordered[:, k - 1] - ordered[:, k]) > self.options['margin']).all()))
        best = values.topk(k, 1)
        # With fewer free experts than k, the surplus ones have the weight 0.
        chosen = torch.zeros(total, num, dtype=torch.bool)
        chosen.scatter_(1, best.indices, best.values > -math.inf)
        if self.options['softmax'] == 'over_all':
            free = torch.ones(num, dtype=torch.bool)
            if kind in ('relative', 'mean') and training:
                free = values[0] > -math.inf
            weights = logits.masked_fill(~free, -math.inf).softmax(1) * chosen
        else:
            weights = logits.masked_fill(~chosen, -math.inf).softmax(1)
        kept = weights
        if training and self.options['capacity']:
            kept = weights * self.within_capacity(weights.detach(), chosen)
        outputs = torch.einsum('eoc,pc->peo', self.numbers['weight'], pixels) + self.numbers['bias']
        y = torch.einsum('pe,peo->po', member @ kept, outputs)
        if training and kind:
            self.update(weights.detach(), chosen)
        n, _, h, w = x.shape
        return y.view(n, h, w, -1).movedim(-1, 1)

    def within_capacity(self, weights, chosen):
        num, k = self.options['num_experts'], self.options['top_k']
        capacity = math.ceil(self.options['capacity'] * len(weights) * k / num)
        kept = torch.zeros_like(chosen)
        for expert in range(num):
            takers = [t for t in range(len(weights)) if chosen[t, expert]]
            takers.sort(key=lambda t: -float(weights[t, expert]))
            between = [float(weights[t, expert]) for t in takers[capacity - 1 : capacity + 1]]
            assume(len(between) < 2 or between[0] - between[1] > self.options['margin'])
            kept[takers[:capacity], expert] = True
        return kept

    def update(self, weights, chosen):
        kind, importance = self.options['constraint'], weights.sum(0)
        if kind == 'relative':
            self.state = self.state + importance / importance.mean() - 1
        elif kind == 'mean':
            self.batches += 1
            share = importance / importance.sum()
            self.state = self.state + (share - self.state) / self.batches
        else:
            load = chosen.sum(0).double()
            self.state = self.state + 0.05 * (load.mean() - load).sign()


@st.composite
def cases(draw):
    num = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num))
    experts = draw(st.sampled_from(sorted(EXPERTS)))
    granularities = ['pixel'] if experts == 'linear' else ['image', 'patch', 'pixel']
    granularity = draw(st.sampled_from(granularities))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return {
        'num_experts': num,
        'top_k': top_k,
        'experts': experts,
        'granularity': granularity,
        'grid': draw(st.integers(2, 3)) if granularity == 'patch' else 1,
        'constraint': draw(st.sampled_from([None, *CONSTRAINTS])),
        'softmax': 'over_all' if top_k == 1 else draw(st.sampled_from(['over_chosen', 'over_all'])),
        'capacity': draw(st.sampled_from([None, 0.5, 1.0, 1.5])),
        'dtype': dtype,
        'margin': 1e-4 if dtype == torch.float32 else 1e-9,
        'out': draw(st.integers(1, 3)),
        'shape': (
            draw(st.integers(1, 4)),
            C,
            draw(st.integers(1, 5)),
            draw(st.integers(1, 5)),
        ),
        'layout': draw(st.sampled_from(['plain', 'channels_last', 'transposed', 'strided'])),
        'seed': draw(st.integers(0, 2**16)),
    }


def laid_out(x, layout):
    """The same numbers in another order in memory."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == 'strided':
        return torch.stack((x, x + 1), dim=-1)[..., 0]
    return x


def build(options):
    num = options['num_experts']
    constraint = options['constraint']
    router = {
        'type': 'mmdet_moe.GAPRouter',
        'in_channels': C,
        'noise': False,
        'softmax': options['softmax'],
    }
    if constraint:
        router['constraint'] = CONSTRAINTS[constraint]
    layer = MoELayer(
        EXPERTS[options['experts']](num, options['out']),
        num,
        options['top_k'],
        router,
        granularity=options['granularity'],
        grid_size=options['grid'],
        capacity_factor=options['capacity'],
    )
    layer = layer.to(options['dtype'])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def close(got, expected, dtype):
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@given(cases())
def check(options):
    torch.manual_seed(options['seed'])
    layer = build(options)
    reference = Reference(layer, options)
    for step in range(4):
        training = step < 3
        layer.train(training)
        numbers = torch.randn(options['shape'], dtype=torch.float64).to(options['dtype'])
        x = laid_out(numbers, options['layout']).detach().requires_grad_()
        x0 = numbers.double().clone().requires_grad_()
        y, y0 = layer(x), reference(x0, training)
        close(y, y0, options['dtype'])
        direction = torch.randn(y.shape, dtype=torch.float64)
        (y * direction.to(y)).sum().backward()
        (y0 * direction).sum().backward()
        close(x.grad, x0.grad, options['dtype'])
    weight, bias = of_kind(layer)
    pairs = {'router': layer.router.fc.weight, 'router bias': layer.router.fc.bias}
    for name, parameter in pairs.items():
        close(parameter.grad, reference.numbers[name].grad, options['dtype'])
    for kind, tensor in (('weight', weight), ('bias', bias)):
        got = gradient_of(layer, kind)
        close(got.view_as(tensor), reference.numbers[kind].grad, options['dtype'])
    if options['constraint']:
        state = next(iter(layer.router.constraint.buffers()))
        close(state, reference.state, torch.float32)


def gradient_of(layer, kind):
    experts = layer.experts
    if isinstance(experts, nn.ModuleList):
        return torch.stack([getattr(expert, kind).grad for expert in experts])
    return getattr(experts, kind).grad


def test_against_the_dense_reference(request):
    examples = 600 if request.config.getoption('--all') else 25
    quiet = [HealthCheck.filter_too_much, HealthCheck.too_slow]
    options = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )
    options(check)()


# Odd inputs ---------------------------------------------------------------------------------------


@pytest.fixture(params=['modules', 'conv', 'linear'])
def layer(request):
    torch.manual_seed(1)
    granularity = 'pixel' if request.param == 'linear' else 'image'
    layer = MoELayer(EXPERTS[request.param](4, 2), 4, 2, in_channels=C, granularity=granularity)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_the_input_is_named(layer, value):
    x = torch.randn(2, C, 4, 4)
    x[1, 0, 2, 2] = value
    with pytest.raises(NonFiniteRouterError, match='input'):
        layer(x)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_in_the_router_is_named(layer, value):
    with torch.no_grad():
        layer.router.fc.weight[0, 0] = value
    with pytest.raises(NonFiniteRouterError, match='router'):
        layer(torch.randn(2, C, 4, 4))


def test_what_is_not_finite_in_one_item_s_gradient_stays_there(layer):
    layer.eval()
    x = torch.randn(3, C, 4, 4, requires_grad=True)
    gradient = torch.ones(3, 2, 4, 4)
    gradient[1] = math.nan
    layer(x).backward(gradient)
    assert x.grad[[0, 2]].isfinite().all()
    assert x.grad[1].isnan().all()


def test_empty_batches(layer):
    x = torch.randn(0, C, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 2, 4, 4)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_a_strip_of_4000_pixels(layer):
    layer.eval()
    x = torch.randn(1, C, 2, 4000)
    weight, bias = of_kind(layer)
    outputs = torch.einsum('eoc,nchw->neohw', weight, x) + bias[None, :, :, None, None]
    y, routing = layer(x), layer.routing
    gates = torch.zeros(len(routing.weights), 4).scatter(1, routing.expert_ids, routing.weights)
    gates = gates.view(1, *((2, 4000) if len(gates) > 1 else (1, 1)), 4).movedim(-1, 1)
    torch.testing.assert_close(y, (outputs * gates[:, :, None]).sum(1), rtol=1e-4, atol=1e-4)


# Batch norm in experts ----------------------------------------------------------------------------


def with_batch_norm():
    experts = [nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)) for _ in range(3)]
    layer = MoELayer(experts, 3, 1, in_channels=C)
    nn.init.zeros_(layer.router.fc.weight)
    nn.init.constant_(layer.router.fc.bias, 0.0)
    layer.router.fc.bias.data[1] = 9.0
    return layer.train()


def test_a_batch_norm_rests_on_a_single_value():
    layer = with_batch_norm()
    norm = layer.experts[1][1]
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(4.0)
    x = torch.randn(1, C, 1, 1)
    y = layer(x)
    expected = (layer.experts[1][0](x) - 0.5) / math.sqrt(4 + norm.eps)
    torch.testing.assert_close(y, layer.routing.weights.item() * expected)
    assert norm.running_mean.tolist() == [0.5] * C
    assert norm.num_batches_tracked == 0
    assert norm.training
    y.sum().backward()
    # The experts may have been in another list before, as those that are spread over ranks.
    ModuleExperts(layer.experts)
    layer(x)
    assert norm.training


def test_a_batch_norm_takes_the_items_of_its_expert():
    layer = with_batch_norm()
    norm = layer.experts[1][1]
    x = torch.randn(2, C, 1, 1)
    features = layer.experts[1][0](x).flatten(1)
    layer(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * features.mean(0))
    assert norm.num_batches_tracked == 1
    assert not layer.experts[0][1].num_batches_tracked


# Long trainings -----------------------------------------------------------------------------------


@pytest.mark.sweep(keep=0.4)
@pytest.mark.parametrize('alike', [False, True])
@pytest.mark.parametrize('constraint', [None, *CONSTRAINTS])
def test_long_trainings(request, constraint, alike):
    """No NaN, and no memory that grows, in 2,000 iterations (100 without ``--all``)."""
    iterations = 2000 if request.config.getoption('--all') else 100
    router = {'type': 'mmdet_moe.GAPRouter'}
    if constraint:
        router |= {'constraint': CONSTRAINTS[constraint]}
    layer = MoELayer(EXPERTS['conv'](4, 2), 4, 2, router, in_channels=C)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    image = torch.randn(1, C, 3, 3).expand(4, C, 3, 3)
    counts = []
    for step in range(iterations):
        x = image if alike else torch.randn(4, C, 3, 3)
        loss = (layer(x) - x[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        if step in (iterations // 2, iterations - 1):
            gc.collect()
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert counts[0] == counts[1]
