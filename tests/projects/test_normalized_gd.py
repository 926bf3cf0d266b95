"""Steps of normalised gradient descent computed by hand."""

import copy
import math
import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MLPExperts, MoELayer
from projects.cluster_theory import NormalizedGD


def parameter(values, gradient, dtype=torch.float32):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    return p


def test_one_group():
    a, b = parameter([1.0, 2], [3.0, 0]), parameter([[5.0]], [[4.0]])
    NormalizedGD([a, b], lr=0.5).step()
    # The norm of (3, 0, 4) is 5.
    torch.testing.assert_close(a.data, torch.tensor([1 - 0.5 * 3 / 5, 2]))
    torch.testing.assert_close(b.data, torch.tensor([[5 - 0.5 * 4 / 5]]))


def test_groups_have_norms_and_options_of_their_own():
    a, b, c = parameter([0.0], [8.0]), parameter([0.0], [-2.0]), parameter([3.0], [2.0])
    groups = [
        {'params': [a]},
        {'params': [b], 'lr': 3.0},
        {'params': [c], 'normalize': False, 'weight_decay': 0.1},
    ]
    NormalizedGD(groups, lr=1.0).step()
    assert a.item() == -1
    assert b.item() == 3
    assert c.item() == pytest.approx(3 - (2 + 0.1 * 3))


def test_weight_decay_is_not_normalised():
    a = parameter([10.0, 0], [6.0, 8])
    NormalizedGD([a], lr=0.5, weight_decay=0.2).step()
    torch.testing.assert_close(a.data, torch.tensor([10 - 0.5 * (0.6 + 2), -0.5 * 0.8]))


def test_slices_of_stacked_parameters():
    weight = parameter([[1.0, 1], [1, 1], [1, 1]], [[3.0, 0], [0, 0], [0, 1e-6]])
    bias = parameter([1.0, 1, 1], [4.0, 0, 0])
    NormalizedGD([{'params': [weight, bias], 'stacked': True}], lr=1.0).step()
    # The second expert had no samples: it stays, and is no NaN.
    torch.testing.assert_close(weight.data, torch.tensor([[0.4, 1], [1, 1], [1, 0]]))
    torch.testing.assert_close(bias.data, torch.tensor([0.2, 1, 1]))


def test_without_gradient():
    a, b, c = parameter([1.0], None), parameter([1.0], [0.0]), parameter([1.0], None)
    NormalizedGD([{'params': [a, b]}, {'params': [c]}], lr=1.0).step()
    assert a.item() == b.item() == c.item() == 1


def test_closure():
    a = parameter([2.0], None)

    def closure():
        loss = 3 * a.sum()
        loss.backward()
        return loss

    assert NormalizedGD([a], lr=0.25).step(closure).item() == 6
    assert a.item() == 1.75


def test_parameters_without_axes_or_elements():
    # mmcv's Scale has the former.
    a, b, c = parameter(1.0, 3.0), parameter([1.0], [-4.0]), parameter([], [])
    NormalizedGD([{'params': [a, b]}, {'params': [c]}], lr=1.0).step()
    assert a.item() == pytest.approx(1 - 3 / 5)
    assert b.item() == pytest.approx(1 + 4 / 5)


@pytest.mark.parametrize(
    ('dtype', 'sizes'),
    [
        # The smallest float, subnormal ones, ones whose squares vanish or overflow, the largest.
        (torch.float32, [2.0**-149, 1e-44, 1e-39, 5e-25, 1.0, 5e20, 1.2e38]),
        (torch.float64, [2.0**-1074, 1e-320, 5e-50, 5e-200, 1.0, 5e20, 5e200, 1e308]),
        (torch.float16, [2.0**-24, 1e-6, 1.0, 3e4]),
        (torch.bfloat16, [1e-38, 5e-25, 1.0, 5e20, 1e38]),
    ],
)
@pytest.mark.parametrize('stacked', [False, True])
def test_small_and_large_gradients(dtype, sizes, stacked):
    """The length of a step does not depend on the length of the gradient."""
    gradients = torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.tensor([[0.0, 1.0]])
    bias = -gradients[:, 1].clone()
    if stacked:
        groups = [(torch.zeros(len(sizes), 2), torch.zeros(len(sizes)), gradients, bias)]
    else:
        rows = zip(gradients, bias, strict=True)
        groups = [(torch.zeros(2), torch.zeros(()), *row) for row in rows]
    for *values, weight_gradient, bias_gradient in groups:
        a, b = (nn.Parameter(value.to(dtype)) for value in values)
        a.grad, b.grad = weight_gradient.to(dtype), bias_gradient.to(dtype)
        NormalizedGD([a, b], lr=1.0, stacked=stacked).step()
        half = torch.full_like(b, math.sqrt(0.5))
        torch.testing.assert_close(b.data, half)
        torch.testing.assert_close(a.data, torch.stack([torch.zeros_like(half), -half], dim=-1))


def test_double_precision():
    a = parameter([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], torch.float64)
    NormalizedGD([a], lr=1.0).step()
    reference = -torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / math.sqrt(14)
    torch.testing.assert_close(a.data, reference, rtol=1e-15, atol=0)


@pytest.mark.parametrize('stacked', [False, True])
def test_scaling_rounds_nothing(stacked):
    """Ordinary gradients make bit by bit the steps of the formula without any scaling."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 7, 3), (5, 33), (5,), (5, 64, 65)]
    for size in (1e-12, 1e-6, 1e-3, 0.3, 7.0, 1e3, 1e12):
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        gradients = [size * torch.randn(shape, generator=generator) for shape in shapes]
        gradients[0] = gradients[0].to(memory_format=torch.channels_last)
        for g in gradients:
            g[1] = 0
        rows = torch.cat([g.reshape(5 if stacked else 1, -1) for g in gradients], dim=1)
        norm = torch.linalg.vector_norm(rows, dim=1)
        factor = torch.where(norm == 0, 0, 1 / norm)
        parameters = [nn.Parameter(value.clone()) for value in values]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        NormalizedGD(parameters, lr=0.3, weight_decay=0.01, stacked=stacked).step()
        for p, value, g in zip(parameters, values, gradients, strict=True):
            step = (g * factor.view(-1, *(1,) * (g.dim() - 1))).add(value, alpha=0.01)
            assert torch.equal(p.data, value.add(step, alpha=-0.3))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_not_swallowed(bad):
    a, b = parameter([1.0, 1], [bad, 1.0]), parameter([1.0], [1.0])
    NormalizedGD([{'params': [a]}, {'params': [b]}], lr=1.0).step()
    assert a.isnan().all()
    assert b.item() == 0
    stack = parameter([[1.0, 1], [1, 1]], [[1.0, bad], [0, 1]])
    NormalizedGD([stack], lr=1.0, stacked=True).step()
    assert stack[0].isnan().all()
    assert stack[1].tolist() == [1, 0]


def test_loss_scaler():
    """A scaled loss that overflows costs a step of its own, not the weights."""
    a = parameter([1.0], None)
    optimizer = NormalizedGD([a], lr=0.25)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**100)
    for expected in (1.0, 0.75):
        optimizer.zero_grad()
        scaler.scale(a.sum() * 2.0**28).backward()
        scaler.step(optimizer)
        scaler.update()
        assert a.item() == expected


def test_sparse_and_complex_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r'shape \(4, 2\) is torch.float32, torch.sparse'):
        NormalizedGD(table.parameters(), lr=1.0).step()
    NormalizedGD(table.parameters(), lr=1.0, normalize=False).step()
    assert (before - table.weight.data).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]
    a = parameter([1j], [1j], torch.complex64)
    with pytest.raises(ConfigError, match=r'shape \(1,\) is torch.complex64, torch.strided, but'):
        NormalizedGD([a], lr=1.0).step()


def test_learning_rate_in_a_tensor():
    a = parameter([1.0], [8.0])
    optimizer = NormalizedGD([a], lr=torch.tensor(0.5))
    optimizer.step()
    optimizer.param_groups[0]['lr'].fill_(0.25)
    optimizer.step()
    assert a.item() == 0.25


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'lr': -1}, 'lr=-1 must be a finite number of at least 0'),
        ({'lr': 'abc'}, "lr='abc' must be a finite number of at least 0"),
        ({'lr': math.nan}, 'lr=nan must be a finite number of at least 0'),
        ({'lr': torch.ones(2)}, 'lr=tensor([1., 1.]) must be a finite number of at least 0'),
        ({'weight_decay': -0.5}, 'weight_decay=-0.5 must be a finite number of at least 0'),
        ({'weight_decay': None}, 'weight_decay=None must be a finite number of at least 0'),
        ({'normalize': 'False'}, "normalize='False' must be True or False"),
        ({'stacked': 1}, 'stacked=1 must be True or False'),
    ],
)
def test_refused_options(options, message):
    message = f'^{re.escape(f"NormalizedGD: {message}")}$'
    a, b = parameter([1.0], None), parameter([1.0], None)
    with pytest.raises(ConfigError, match=message):
        NormalizedGD([a], **{'lr': 1, **options})
    with pytest.raises(ConfigError, match=message):  # though no group uses it
        NormalizedGD(
            [{'params': [a], 'lr': 1, 'weight_decay': 0, 'normalize': True, 'stacked': False}],
            **{'lr': 1, **options},
        )
    with pytest.raises(ConfigError, match=message):
        NormalizedGD([{'params': [a], **options}], lr=1)
    optimizer = NormalizedGD([a], lr=1)
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({'params': [b], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({'params': b})
    assert len(optimizer.param_groups) == 2


def test_refused_groups():
    a, b = parameter([1.0], None), parameter([1.0, 2], None)
    with pytest.raises(ConfigError, match='stacked=True needs parameters with the same length'):
        NormalizedGD([a, b], lr=1, stacked=True)
    with pytest.raises(ConfigError, match='stacked=True needs parameters with the same length'):
        NormalizedGD([parameter(1.0, None)], lr=1, stacked=True)
    optimizer = NormalizedGD([parameter([1.0], None)], lr=1)
    with pytest.raises(ConfigError, match='stacked=True needs parameters with the same length'):
        optimizer.add_param_group({'params': iter([a, b]), 'stacked': True})
    with pytest.raises(ConfigError, match=r"group has unknown keys \['momentum', 'normalise'\]"):
        optimizer.add_param_group({'params': [a], 'normalise': False, 'momentum': 0.9})
    with pytest.raises(ConfigError, match='group=3 must be a dict'):
        optimizer.add_param_group(3)
    assert len(optimizer.param_groups) == 1


def test_notes_of_others_in_a_group():
    """Names of PyTorch, and what schedulers and constructors of the toolboxes leave in a group."""
    a = parameter([1.0], [2.0])
    optimizer = NormalizedGD([('a', a)], lr=1.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 10, cycle_momentum=False)
    (group,) = optimizer.param_groups
    assert {'param_names', 'initial_lr', 'max_lr', 'min_lr'} <= group.keys()
    NormalizedGD([{**group, 'lr_scale': 0.5, 'group_name': 'layer_0', 'layer_id': 0}], lr=1.0)


def test_state_is_that_of_the_groups():
    def make():
        a, b = parameter([1.0], [2.0]), parameter([[1.0], [1]], [[2.0], [0]])
        return NormalizedGD([{'params': [a]}, {'params': [b], 'stacked': True, 'lr': 0.5}], lr=1.0)

    optimizer = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.param_groups[0]['lr'] = 0.125
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state_dict() == optimizer.state_dict()
    for each in (optimizer, resumed):
        each.step()
        a, b = (group['params'][0] for group in each.param_groups)
        assert a.tolist() == [0.875]
        assert b.tolist() == [[0.5], [1]]


class TwoLayers(nn.Module):
    """A layer of modules, one of stacked weights, and something else."""

    def __init__(self):
        super().__init__()
        self.first = MoELayer(nn.Conv2d(3, 4, 1), 3, 1, in_channels=3)
        self.second = MoELayer(MLPExperts(4, 6, 2, 5), 5, 1, in_channels=4)
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def build(model, **kwargs):
    cfg = {
        'type': 'OptimWrapper',
        'constructor': 'mmdet_moe.ExpertGroupsConstructor',
        'optimizer': {'type': 'mmdet_moe.NormalizedGD', 'lr': 0.01},
        'paramwise_cfg': {'others': {'lr': 0.5, 'normalize': False}},
        'clip_grad': None,
        **kwargs,
    }
    return build_optim_wrapper(model, cfg)


def test_every_expert_moves_as_far():
    model = TwoLayers()
    wrapper = build(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(6, 3, 1, 1)
    loss = model(x).square().sum()
    layers = (model.first, model.second)
    used = [set(layer.routing.expert_ids.flatten().tolist()) for layer in layers]
    kept = {'retain_graph': True, 'allow_unused': True}
    values = torch.autograd.grad(loss, list(model.parameters()), **kept)
    gradients = dict(zip(before, values, strict=True))
    wrapper.update_params(loss)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for e in range(3):
        steps = [moved[f'first.experts.{e}.{name}'] for name in ('weight', 'bias')]
        length = math.sqrt(sum(step.square().sum().item() for step in steps))
        assert length == pytest.approx(0.01 if e in used[0] else 0, abs=1e-6)
    names = [name for name in moved if name.startswith('second.experts.')]
    assert len(names) == 4
    for e in range(5):
        length = math.sqrt(sum(moved[name][e].square().sum().item() for name in names))
        assert length == pytest.approx(0.01 if e in used[1] else 0, abs=1e-6)
    for name in ('first.router.fc.weight', 'head.weight', 'head.bias'):
        torch.testing.assert_close(moved[name], 0.5 * gradients[name], rtol=1e-4, atol=1e-6)


def test_frozen_experts_are_left_out():
    model = TwoLayers()
    model.first.experts[1].requires_grad_(False)
    model.second.experts.requires_grad_(False)
    groups = build(model).optimizer.param_groups
    assert [len(group['params']) for group in groups[:-1]] == [2, 2]
    everything = [p for group in groups for p in group['params']]
    assert len(everything) == len(set(map(id, everything)))
    assert {id(p) for p in everything} == {id(p) for p in model.parameters() if p.requires_grad}


def test_one_group_of_stacked_experts():
    layer = MoELayer(LinearExperts(4, 2, 3), 3, 1, in_channels=4)
    layer.router.requires_grad_(False)
    (group,) = build(layer).optimizer.param_groups
    assert group['stacked']
    assert len(group['params']) == 2


class Nested(nn.Module):
    """An MoE layer whose experts have one of modules and one of stacked weights each."""

    def __init__(self):
        super().__init__()
        modules = MoELayer(nn.Conv2d(4, 4, 1), 3, 1, in_channels=4)
        stacked = MoELayer(LinearExperts(4, 4, 2), 2, 1, in_channels=4)
        expert = nn.Sequential(nn.Conv2d(4, 4, 1), modules, stacked)
        self.moe = MoELayer(expert, 2, 1, in_channels=4)

    def forward(self, x):
        return self.moe(x)


def test_nested_layers():
    model = Nested()
    wrapper = build(model)
    names = {p: name for name, p in model.named_parameters()}
    groups = [{names[p] for p in group['params']} for group in wrapper.optimizer.param_groups]
    *experts, rest = groups
    assert rest == {name for name in names.values() if name.startswith('moe.router.')}
    inner = [f'moe.experts.{e}.1.experts.{i}.' for e in range(2) for i in range(3)]
    inner += [f'moe.experts.{e}.2.experts.' for e in range(2)]
    outer = ['moe.experts.0.', 'moe.experts.1.']
    expected = {
        prefix: {
            name
            for name in names.values()
            # The longest prefix of a name is that of the innermost expert.
            if prefix == max(filter(name.startswith, inner + outer), key=len, default=None)
        }
        for prefix in inner + outer
    }
    assert 'moe.experts.0.1.router.fc.weight' in expected['moe.experts.0.']
    assert sorted(map(sorted, experts)) == sorted(map(sorted, expected.values()))
    assert [group['stacked'] for group in wrapper.optimizer.param_groups].count(True) == 2

    before = {name: p.detach().clone() for p, name in names.items()}
    model(torch.randn(8, 4, 1, 1)).square().sum().backward()
    wrapper.step()
    for prefix in (*inner[:6], *outer):
        own = [p for p, name in names.items() if name in expected[prefix]]
        moved = math.sqrt(sum((p - before[names[p]]).square().sum().item() for p in own))
        used = any(p.grad is not None and p.grad.any() for p in own)
        assert moved == pytest.approx(0.01 if used else 0, abs=1e-6)


def test_experts_that_share_parameters():
    model = TwoLayers()
    model.first.experts[2].weight = model.first.experts[0].weight
    with pytest.raises(ConfigError, match=r"share the parameters \['first.experts.0.weight'\]"):
        build(model)


def test_resume(make_runner, toy_model):
    """A run in two parts, with a scheduler, ends where one without a break does."""
    options = {
        'optim_wrapper': {
            'constructor': 'mmdet_moe.ExpertGroupsConstructor',
            'optimizer': {'type': 'mmdet_moe.NormalizedGD', 'lr': 0.01},
            'paramwise_cfg': {'others': {'lr': 0.1, 'normalize': False}},
        },
        'param_scheduler': {'type': 'ExponentialLR', 'gamma': 0.5, 'by_epoch': False, 'end': 9},
    }
    torch.manual_seed(0)
    model = toy_model()
    whole = make_runner(copy.deepcopy(model), name='whole', **options)
    whole.train()
    make_runner(copy.deepcopy(model), max_iters=2, name='parts', **options).train()
    resumed = make_runner(copy.deepcopy(model), name='parts', resume=True, **options)
    resumed.train()
    first, *_, rest = resumed.optim_wrapper.optimizer.param_groups
    assert (first['lr'], rest['lr']) == (0.01 / 16, 0.1 / 16)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


OTHERS = 'ExpertGroupsConstructor: optim_wrapper.paramwise_cfg.others'


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (TwoLayers, {'paramwise_cfg': {'router': {}}}, r"unknown keys \['router'\]"),
        (TwoLayers, {'paramwise_cfg': 3}, r'paramwise_cfg=3 must be a dict'),
        (
            TwoLayers,
            {'paramwise_cfg': {'others': {'normalise': False}}},
            rf"^{OTHERS} has unknown keys \['normalise'\]; known are \['lr', 'weight_decay'",
        ),
        (TwoLayers, {'paramwise_cfg': {'others': {'params': []}}}, r"unknown keys \['params'\]"),
        (TwoLayers, {'paramwise_cfg': {'others': None}}, f'^{OTHERS}=None must be a dict'),
        (TwoLayers, {'paramwise_cfg': {'others': {'lr': 'abc'}}}, f"^{OTHERS}.lr='abc' must be a"),
        (
            TwoLayers,
            {'paramwise_cfg': {'others': {'normalize': 'False'}}},
            f"^{OTHERS}.normalize='False' must be True or False",
        ),
        (TwoLayers, {'optimizer': None}, 'optim_wrapper.optimizer=None must be a dict'),
        (TwoLayers, {'optimizer': {'type': 'SGD', 'lr': 1}}, 'SGD treats all groups alike'),
        (lambda: nn.Linear(1, 1), {}, 'found no MoE layer in Linear'),
    ],
)
def test_constructor_refuses(model, options, message):
    with pytest.raises(ConfigError, match=message):
        build(model(), **options)
