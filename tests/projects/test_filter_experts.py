"""Two-layer CNNs as experts against the paper's formula, number by number."""

import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import GAPRouter, MoELayer
from projects.cluster_theory import FilterExperts

D, P, E, J, CLASSES = 5, 4, 3, 2, 2


def outputs_by_hand(experts, x, power):
    """(T, E, C'): ``sum_p sum_j (w · x_p + b) ** power``."""
    y = torch.zeros(len(x), E, CLASSES, dtype=x.dtype)
    for t in range(len(x)):
        for e in range(E):
            for row in range(CLASSES * J):
                for p in range(P):
                    z = experts.weight[e, row] @ x[t, :, 0, p] + experts.bias[e, row]
                    y[t, e, row // J] += z**power
    return y


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('strided', [False, True])
@pytest.mark.parametrize(('activation', 'power'), [('cubic', 3), ('linear', 1)])
def test_against_the_formula(activation, power, strided, top_k):
    experts = FilterExperts(D, CLASSES, J, E, activation)
    layer = MoELayer(experts, E, top_k, GAPRouter(D, E, top_k, noise=False)).double()
    nn.init.normal_(layer.router.fc.weight)
    x = torch.randn(6, D, 1, P, dtype=torch.float64)
    if strided:
        x = x[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)[:, :, None]
    y = layer(x)
    every = outputs_by_hand(experts, x, power)
    expected = (layer.routing.dense_weights()[:, :, None] * every).sum(1)
    torch.testing.assert_close(y, expected)
    coefficients = torch.randn_like(y)
    parameters = [*experts.parameters(), layer.router.fc.weight]
    found = torch.autograd.grad((y * coefficients).sum(), parameters, retain_graph=True)
    reference = torch.autograd.grad((expected * coefficients).sum(), parameters)
    for gradient, by_hand in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient, by_hand)


def test_as_the_convolution_of_the_paper():
    """A one-dimensional convolution of stride and width d over the patches in a row."""
    experts = FilterExperts(D, CLASSES, J, 1).double()
    conv = nn.Conv1d(1, CLASSES * J, D, stride=D).double()
    conv.weight.data = experts.weight[0][:, None].detach()
    conv.bias.data = experts.bias[0].detach()
    patches = torch.randn(7, P, D, dtype=torch.float64)
    z = conv(patches.flatten(1)[:, None]).pow(3).sum(2)
    expected = torch.stack([z[:, :J].sum(1), z[:, J:].sum(1)], dim=1)
    layer = MoELayer(experts, 1, 1, GAPRouter(D, 1, 1)).double()
    torch.testing.assert_close(layer(patches.transpose(1, 2)[:, :, None]), expected)


def test_unused_experts_have_a_gradient_of_zero():
    experts = FilterExperts(D, CLASSES, J, E)
    layer = MoELayer(experts, E, 1, GAPRouter(D, E, 1, noise=False))
    nn.init.constant_(layer.router.fc.bias, 0)
    layer.router.fc.bias.data[1] = 100
    layer(torch.randn(4, D, 1, P)).sum().backward()
    used = experts.weight.grad.flatten(1).any(1)
    assert used.tolist() == [False, True, False]


def test_initial_values():
    torch.manual_seed(3)
    experts = FilterExperts(50, 2, 8, 4, init_scale=1e-3)
    for parameter in experts.parameters():
        assert parameter.abs().max() <= 1e-3 / 50**0.5
        assert parameter.std().item() == pytest.approx(1e-3 / 150**0.5, rel=0.2)
    assert len({row.sum().item() for row in experts.weight}) == 4


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('in_channels', 0, 'must be an integer of at least 1'),
        ('num_classes', 0, 'must be an integer of at least 1'),
        ('num_filters', 2.5, 'must be an integer of at least 1'),
        ('num_experts', -1, 'must be an integer of at least 1'),
        ('init_scale', float('nan'), 'must be a finite number greater than 0'),
        ('init_scale', 0.0, 'must be a finite number greater than 0'),
    ],
)
def test_numbers_out_of_range(field, value, message):
    options = dict(in_channels=D, num_classes=CLASSES, num_filters=J, num_experts=E)
    with pytest.raises(ConfigError, match=f'FilterExperts: {field}={value} {message}'):
        FilterExperts(**{**options, field: value})


def test_refused():
    with pytest.raises(ConfigError, match="activation='relu' is unknown"):
        FilterExperts(D, CLASSES, J, E, 'relu')
    with pytest.raises(ConfigError, match='use granularity="image"'):
        MoELayer(
            FilterExperts(D, CLASSES, J, E), E, 1, in_channels=D, granularity='patch', grid_size=2
        )
