"""The gate of a μMoE against its equation."""

import copy

import mumoe_by_hand as by_hand
import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.mumoe import ExpertGate


def make(norm='bn', activation='entmax15', levels=(5, 4), features=3):
    gate = ExpertGate(features, levels, norm, activation)
    for weight in gate.weights:
        nn.init.normal_(weight)
    return gate


@pytest.mark.parametrize('activation', ['entmax15', 'softmax'])
@pytest.mark.parametrize('norm', ['bn', 'ln'])
def test_coefficients(norm, activation):
    gate = make(norm, activation).double()
    x = 2 * torch.randn(50, 3).double() + 1
    gate(x)
    for training in (True, False):
        gate.train(training)
        expected, actual = by_hand.gated(gate, x), gate(x)
        torch.testing.assert_close(list(actual), expected, rtol=0, atol=1e-12)
        for a in actual:
            assert (a >= 0).all()
            torch.testing.assert_close(a.sum(1), torch.ones(50).double())
            assert (a == 0).any() == (activation == 'entmax15')


def test_starts_with_equal_coefficients():
    gate = ExpertGate(3, (5, 4), 'bn', 'entmax15')
    first, second = gate(torch.randn(7, 3))
    torch.testing.assert_close(first, torch.full((7, 5), 1 / 5))
    torch.testing.assert_close(second, torch.full((7, 4), 1 / 4))


def test_statistics_are_those_of_batch_normalisation():
    gate = make(levels=(5,))
    x = torch.randn(20, 3)
    gate(x)
    logits = x @ gate.weights[0]
    (norm,) = gate.norms
    torch.testing.assert_close(norm.running_mean, 0.1 * logits.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * logits.var(0))
    assert not list(norm.parameters())


@pytest.mark.parametrize('norm', ['bn', 'ln'])
def test_float32_under_autocast_and_of_a_bfloat16_model(norm):
    gate = make(norm)
    x = torch.randn(30, 3).bfloat16()
    expected = copy.deepcopy(gate)(x.float())
    with torch.autocast('cpu', torch.bfloat16):
        for a, b in zip(gate(x), expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)
    rounded = gate.bfloat16()
    exact = copy.deepcopy(rounded).float()
    for a, b in zip(rounded(x), exact(x.float()), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    assert all(value.dtype != torch.bfloat16 for value in rounded.buffers())
    for a, b in zip(rounded.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_synchronised_batch_normalisation():
    """As MMEngine's ``sync_bn='torch'`` converts a model."""
    from mmengine.model import convert_sync_batchnorm

    gate = make().eval()
    for norm in gate.norms:
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x = torch.randn(30, 3)
    expected = gate(x)
    converted = convert_sync_batchnorm(copy.deepcopy(gate), 'torch').eval()
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in converted.norms)
    torch.testing.assert_close(converted(x), expected)
    assert converted.state_dict().keys() == gate.state_dict().keys()
    torch.testing.assert_close(converted.bfloat16()(x), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize('field', ['norm', 'activation'])
def test_unknown_options(field):
    with pytest.raises(ConfigError, match=f"{field}='x' is unknown; use one of"):
        make(**{field: 'x'})
