"""Steps of normalised gradient descent computed by hand."""

import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_moe.engine.optimizers import NormalizedGD
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MLPExperts, MoELayer


def parameter(values, gradient):
    p = nn.Parameter(torch.tensor(values))
    p.grad = None if gradient is None else torch.tensor(gradient)
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


def test_refused():
    a, b = parameter([1.0], None), parameter([1.0, 2], None)
    with pytest.raises(ConfigError, match='lr=-1 must not be negative'):
        NormalizedGD([a], lr=-1)
    with pytest.raises(ConfigError, match=r'weight_decay=-0\.5 must not be negative'):
        NormalizedGD([{'params': [a], 'weight_decay': -0.5}], lr=1)
    with pytest.raises(ConfigError, match='stacked=True needs parameters with the same length'):
        NormalizedGD([a, b], lr=1, stacked=True)
    with pytest.raises(ConfigError, match='stacked=True needs parameters with the same length'):
        NormalizedGD([parameter(1.0, None)], lr=1, stacked=True)


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


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (TwoLayers, {'paramwise_cfg': {'router': {}}}, r"unknown keys \['router'\]"),
        (TwoLayers, {'optimizer': {'type': 'SGD', 'lr': 1}}, 'SGD treats all groups alike'),
        (lambda: nn.Linear(1, 1), {}, 'found no MoE layer in Linear'),
    ],
)
def test_constructor_refuses(model, options, message):
    with pytest.raises(ConfigError, match=message):
        build(model(), **options)
