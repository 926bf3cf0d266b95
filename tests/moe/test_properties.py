"""``MoELayer`` for options drawn at random, against a dense layer written on its own.

The reference computes every expert on every pixel in float64 with plain sums, and its gradients
come from autograd through these sums. It shares no code with the package.

How far a result may lie from it is a formula as well. The reference computed with the absolute
value of every number, and so without cancellation, bounds what one relative rounding error in each
number can add up to: results, and gradients by its own gradients.
"""

import gc
import math
from contextlib import nullcontext

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from mmdet_moe.errors import NonFiniteRouterError
from mmdet_moe.moe import ModuleExperts, MoELayer

C = 3
HIDDEN = 2
#: How many of them are granted; the worst of 250 examples had 1.3.
ROUNDINGS = 4
CONSTRAINTS = {
    'relative': {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.2},
    'mean': {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 0.05},
    'bias': {'type': 'mmdet_moe.BiasBalancing', 'update_rate': 0.05},
}
ROUTERS = {
    'gap': {'type': 'mmdet_moe.GAPRouter'},
    'conv': {'type': 'mmdet_moe.ConvGAPRouter', 'conv_channels': HIDDEN},
}
EXPERTS = {
    'modules': lambda num, out, kernel=1: [
        nn.Conv2d(C, out, kernel, padding=kernel // 2) for _ in range(num)
    ],
    'conv': lambda num, out, kernel=1: {
        'type': 'mmdet_moe.ConvExperts',
        'num_experts': num,
        'in_channels': C,
        'out_channels': out,
        'kernel_size': kernel,
        'padding': kernel // 2,
    },
    'modules of vectors': lambda num, out: [nn.Linear(C, out) for _ in range(num)],
    'linear': lambda num, out: {
        'type': 'mmdet_moe.LinearExperts',
        'num_experts': num,
        'in_features': C,
        'out_features': out,
    },
    'mlp': lambda num, out: {
        'type': 'mmdet_moe.MLPExperts',
        'num_experts': num,
        'in_features': C,
        'hidden_features': HIDDEN,
        'out_features': out,
        'activation': 'SiLU',
    },
}
GRANULARITIES = {
    'modules': ['image', 'patch', 'pixel'],
    'conv': ['image', 'patch', 'pixel'],
    'modules of vectors': ['token'],
    'linear': ['pixel', 'token'],
    'mlp': ['pixel', 'token'],
}


def numbers_of(layer, of=lambda parameter: parameter):
    """What ``of`` gives of every parameter; those of the experts with E in front."""
    experts = layer.experts
    numbers = {f'router.{n}': of(p) for n, p in layer.router.named_parameters()}
    if isinstance(experts, nn.ModuleList):
        for name in ('weight', 'bias'):
            numbers[f'0.{name}'] = torch.stack([of(getattr(e, name)) for e in experts])
    else:
        names = dict(experts.named_parameters())
        # An MLP's are called 0.weight, 0.bias, 1.weight and so on.
        numbers |= {n if n[0].isdigit() else f'0.{n}': of(p) for n, p in names.items()}
    return numbers


class Reference:
    """What the layer should do, in float64; the state of the constraint goes along."""

    def __init__(self, layer, options):
        self.options = options
        numbers = {n: p.detach().double() for n, p in numbers_of(layer).items()}
        self.numbers = {n: p.clone().requires_grad_() for n, p in numbers.items()}
        self.sizes = {n: p.abs().requires_grad_() for n, p in numbers.items()}
        self.state = torch.zeros(options['num_experts'], dtype=torch.float64)
        self.batches = 0

    def items(self, x):
        """Item of each pixel (N, H, W), and the number of them."""
        n, _, h, w = x.shape
        image = torch.arange(n)[:, None, None].expand(n, h, w)
        if self.options['granularity'] == 'image':
            return image, n
        if self.options['granularity'] in ('pixel', 'token'):
            return torch.arange(n * h * w).view(n, h, w), n * h * w
        # Cell i starts at the pixel i · h / g, rounded down. Maps smaller than the grid have fewer.
        rows, columns = min(self.options['grid'], h), min(self.options['grid'], w)
        row = (torch.arange(1, h + 1) * rows - 1) // h
        cell = row[:, None] * columns + (torch.arange(1, w + 1) * columns - 1) // w
        return image * rows * columns + cell, n * rows * columns

    def logits(self, numbers, x, item, total):
        if 'router.conv.weight' in numbers:
            kernel, bias = numbers['router.conv.weight'], numbers['router.conv.bias']
            x = F.conv2d(x, kernel, bias, padding=1).relu()
        member = F.one_hot(item.flatten(), total).double()
        pooled = member.T @ x.movedim(1, -1).flatten(0, 2) / member.sum(0)[:, None]
        return pooled @ numbers['router.fc.weight'].T + numbers['router.fc.bias']

    def mixed(self, numbers, x, weights, item, activation):
        kernel = numbers['0.weight']
        if kernel.dim() == 3:
            kernel = kernel[..., None, None]
        padding = kernel.shape[-1] // 2
        y = F.conv2d(x, kernel.flatten(0, 1), numbers['0.bias'].flatten(), padding=padding)
        y = y.unflatten(1, kernel.shape[:2])
        if '1.weight' in numbers:
            y = torch.einsum('eoc,nechw->neohw', numbers['1.weight'], activation(y))
            y = y + numbers['1.bias'][:, :, None, None]
        return torch.einsum('nhwe,neohw->nohw', weights[item], y)

    def __call__(self, x, training):
        """The result for x (N, C, H, W), and the bound on roundings of it."""
        num, k = self.options['num_experts'], self.options['top_k']
        item, total = self.items(x)
        logits = self.logits(self.numbers, x, item, total)
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
        among_chosen = logits.masked_fill(~chosen, -math.inf).softmax(1)
        probabilities = weights = among_chosen
        if self.options['softmax'] != 'over_chosen':
            probabilities = logits.masked_fill(values == -math.inf, -math.inf).softmax(1)
            weights = probabilities * chosen
        if self.options['softmax'] == 'straight_through':
            weights = weights + (among_chosen - weights).detach()
        kept = chosen
        if training and self.options['capacity']:
            kept = self.within_capacity(weights.detach(), chosen)
        y = self.mixed(self.numbers, x, weights * kept, item, F.silu)
        if training and kind:
            self.update(weights.detach(), chosen)
        sizes = self.sizes_of_weights(x, item, probabilities.detach())
        sizes = (weights.detach() + sizes) * kept
        # At least as large as SiLU, its first and its second derivative (times the rounding error).
        bound = self.mixed(self.sizes, self.x_size, sizes, item, lambda v: 1.1 * v + 0.5 * v**2)
        return y, bound

    def sizes_of_weights(self, x, item, probabilities):
        """(items, E): what the softmax makes of errors, by the absolute values of its Jacobian."""
        self.x_size = x.detach().abs().requires_grad_()
        logits = self.logits(self.sizes, self.x_size, item, len(probabilities))
        errors = logits - logits.detach()
        if not self.options['half']:  # where the router is no more exact than the experts
            errors = errors * (1 + logits.detach()) + logits.detach()
        errors = probabilities * errors
        return errors + probabilities * errors.sum(1, keepdim=True)

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


DTYPES = {
    'float32': torch.float32,
    'float64': torch.float64,
    'bfloat16': torch.bfloat16,
    'autocast': torch.float32,
}


@st.composite
def cases(draw):
    num = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num))
    experts = draw(st.sampled_from(sorted(EXPERTS)))
    granularity = draw(st.sampled_from(GRANULARITIES[experts]))
    takes_maps = experts in ('modules', 'conv')
    whole_maps = takes_maps and granularity in ('patch', 'pixel') and draw(st.booleans())
    single_pixels = not takes_maps or (granularity == 'pixel' and not whole_maps)
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    softmax = ['over_all', 'straight_through'] + ['over_chosen'] * (top_k > 1)
    return {
        'num_experts': num,
        'top_k': top_k,
        'experts': experts,
        'kernel': 1 if single_pixels else draw(st.sampled_from([1, 3])),
        'granularity': granularity,
        'grid': draw(st.integers(2, 3)) if granularity == 'patch' else 1,
        'whole_maps': whole_maps,
        'router': 'gap' if granularity == 'token' else draw(st.sampled_from(sorted(ROUTERS))),
        'constraint': draw(st.sampled_from([None, *CONSTRAINTS])),
        'softmax': draw(st.sampled_from(softmax)),
        'capacity': draw(st.sampled_from([None, 0.5, 1.0, 1.5])),
        'dtype': DTYPES[dtype],
        'autocast': dtype == 'autocast',
        'half': dtype in ('bfloat16', 'autocast'),
        'margin': 1e-9 if dtype == 'float64' else 1e-4,  # the router's own, at least in float32
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
    constraint = options['constraint']
    router = ROUTERS[options['router']] | {
        'in_channels': C,
        'noise': False,
        'softmax': options['softmax'],
    }
    if constraint:
        router['constraint'] = CONSTRAINTS[constraint]
    size = (options['kernel'],) if options['experts'] in ('modules', 'conv') else ()
    layer = MoELayer(
        EXPERTS[options['experts']](options['num_experts'], options['out'], *size),
        options['num_experts'],
        options['top_k'],
        router,
        granularity=options['granularity'],
        grid_size=options['grid'],
        capacity_factor=options['capacity'],
        whole_maps=options['whole_maps'],
    )
    layer = layer.to(options['dtype'])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def close(got, expected, size, options, what):
    """Within the formula: so many roundings of the dtype, of numbers of that size."""
    dtype = torch.bfloat16 if options['half'] else options['dtype']
    excess = (got.double() - expected).abs() - ROUNDINGS * torch.finfo(dtype).eps * size
    assert (excess <= 1e-12).all(), f'{what} is off by {excess.max():.2g} more than by rounding'


@given(cases())
def check(options):
    torch.manual_seed(options['seed'])
    layer = build(options)
    reference = Reference(layer, options)
    # The layer has the channels of tokens last.
    turned = (1, -1) if options['granularity'] == 'token' else (1, 1)
    half = torch.autocast('cpu', torch.bfloat16) if options['autocast'] else nullcontext()
    for step in range(4):
        training = step < 3
        layer.train(training)
        numbers = torch.randn(options['shape'], dtype=torch.float64).to(options['dtype'])
        x = laid_out(numbers, options['layout']).detach().requires_grad_()
        x0 = numbers.double().clone().requires_grad_()
        with half:
            y = layer(x.movedim(*turned)).movedim(*turned[::-1])
        y0, size = reference(x0, training)
        close(y, y0, size, options, 'the result')
        direction = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        (y * direction).sum().backward()
        (y0 * direction.double()).sum().backward()
        (size * direction.double().abs()).sum().backward()
        close(x.grad, x0.grad, reference.x_size.grad, options, "the input's gradient")
    for name, gradient in numbers_of(layer, lambda parameter: parameter.grad).items():
        of = reference.numbers[name], reference.sizes[name]
        close(gradient, *(number.grad for number in of), options, f'the gradient of {name}')
    if options['constraint']:
        state = next(iter(layer.router.constraint.buffers()))
        torch.testing.assert_close(state.double(), reference.state, rtol=2e-4, atol=2e-4)


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
    with pytest.raises(NonFiniteRouterError, match='the input or a weight has become NaN'):
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
    numbers = numbers_of(layer)
    weight, bias = numbers['0.weight'].flatten(2), numbers['0.bias']
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
