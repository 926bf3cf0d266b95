"""Edited μMoE layers, against the same change made by hand in the whole tensor."""

import copy
from math import prod

import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    CPMuMoE,
    Edit,
    MuMoEConv1x1,
    MuMoEMLP,
    TRMuMoE,
    apply_edits,
    edit_experts,
)

I, OUT, ROWS = 5, 4, 7  # noqa: E741  # inputs, outputs
KINDS = {'cp': (CPMuMoE, 6), 'tr': (TRMuMoE, 3)}
LEVELS = [4, (3, 2)]
EDITS = [
    Edit('moe', 3, 2, scale=-1.5),
    Edit('moe', 3, 2, add=0.7),
    Edit('moe', 3, 2, zero=True),
    Edit('moe', 3, None, scale=2.5),
    Edit('moe', 3, None, add=-0.3),
    Edit('moe', 3, None, zero=True),
]


def make(kind, levels, bias=True, **kwargs):
    """A model whose gate looks at its input, in float64."""
    cls, rank = KINDS[kind]
    model = nn.ModuleDict({'moe': cls(I, OUT, levels, rank, bias=bias, **kwargs)})
    return randomised(model).double().eval()


def randomised(model):
    for weight in model['moe'].gate.weights:
        nn.init.normal_(weight)
    return model


def joint(layer, x):
    """a[n1, n2, …] of every row, (T, E)."""
    a = torch.ones(len(x), 1, dtype=x.dtype)
    for of_level in layer.coefficients(x):
        a = (a[:, :, None] * of_level[:, None]).flatten(1)
    return a


def change(layer, x, edit):
    """What the edit adds to the output of rows: of the whole tensor, one expert, one output."""
    weight = layer.experts.materialise().flatten(0, len(layer.levels) - 1)[edit.expert]
    if layer.experts.bias:
        x_and_one = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    else:
        x_and_one = x
    outputs = range(OUT) if edit.output is None else [edit.output]
    result = torch.zeros(len(x), OUT, dtype=x.dtype)
    for o in outputs:
        contribution = x_and_one @ weight[:, o]
        edited = (
            edit.add + contribution if edit.add is not None else contribution * (edit.scale or 0)
        )
        result[:, o] = edited - contribution
    return result


def rank_of(layer):
    return layer.experts.factors[-1].shape[-1]


@pytest.mark.parametrize('edit', EDITS, ids=str)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('levels', LEVELS, ids=str)
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_against_the_whole_tensor(kind, levels, bias, edit):
    model = make(kind, levels, bias)
    layer = model['moe']
    x = torch.randn(ROWS, I).double()
    a = joint(layer, x)
    before, state, rank = layer(x), copy.deepcopy(model.state_dict()), rank_of(layer)
    parameters = list(model.parameters())
    if edit.add is not None and not bias:
        with pytest.raises(ConfigError, match=r'add=.* needs a bias'):
            apply_edits(model, [edit])
    else:
        expected = before + a[:, [edit.expert]] * change(layer, x, edit)
        assert not torch.allclose(expected, before)
        tensor = layer.experts.materialise().clone()
        with edit_experts(model, [edit]):
            torch.testing.assert_close(layer(x), expected)
            others = torch.arange(prod(layer.levels)) != edit.expert
            edited = layer.experts.materialise()
            flat = (tensor.flatten(0, -3)[others], edited.flatten(0, -3)[others])
            torch.testing.assert_close(*flat)
            if edit.output is None and edit.add is None:
                terms = 0 if isinstance(levels, int) else min(OUT, I + bias)
            else:
                terms = 1
            assert rank_of(layer) == rank + terms
    now = model.state_dict()
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize('edit', EDITS, ids=str)
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_convolution_and_mlp(kind, edit):
    conv = MuMoEConv1x1(I, OUT, 4, 3, factorisation=kind, stride=2)
    model = randomised(nn.ModuleDict({'moe': conv})).double().eval()
    x = torch.randn(2, I, 4, 6).double()
    rows = x[:, :, ::2, ::2].permute(0, 2, 3, 1).flatten(0, 2)
    expected = conv(x).permute(0, 2, 3, 1).flatten(0, 2)
    expected = expected + joint(conv, rows)[:, [3]] * change(conv, rows, edit)
    with edit_experts(model, [edit]):
        torch.testing.assert_close(conv(x).permute(0, 2, 3, 1).flatten(0, 2), expected)

    mlp = MuMoEMLP(I, 6, OUT, (2, 2), 3, factorisation=kind)
    model = randomised(nn.ModuleDict({'moe': mlp})).double().eval()
    x = torch.randn(ROWS, I).double()
    hidden = nn.functional.gelu(mlp.hidden(x, mlp.coefficients(x)))
    expected = mlp(x) + joint(mlp, x)[:, [3]] * change(mlp, hidden, edit)
    with edit_experts(model, [edit]):
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize('levels', LEVELS, ids=str)
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_edits_compose_and_their_state_dict_loads(kind, levels):
    model = make(kind, levels)
    layer, x = model['moe'], torch.randn(ROWS, I).double()
    a, weight = joint(layer, x), layer.experts.materialise().flatten(0, -3)[1]
    c = x @ weight[:-1, 0] + weight[-1, 0]
    expected = layer(x)
    expected[:, 0] += a[:, 1] * (2 * (c + 0.5) - c)
    apply_edits(model, [Edit('moe', 1, 0, add=0.5), Edit('moe', 1, 0, scale=2)])
    torch.testing.assert_close(layer(x), expected)
    loaded = make(kind, levels)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded['moe'](x), layer(x))


def test_a_zeroed_expert_is_exactly_zero():
    model = make('cp', 4)
    apply_edits(model, [Edit('moe', 2, None, zero=True)])
    assert not model['moe'].experts.expert_weight(2).any()


def test_gradients_are_put_back():
    model, x = make('cp', 4).train(), torch.randn(ROWS, I).double()
    model['moe'](x).sum().backward()
    grads = [p.grad.clone() for p in model['moe'].experts.parameters()]
    with edit_experts(model, EDITS):
        model['moe'](x).sum().backward()
    for parameter, grad in zip(model['moe'].experts.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize('kind', KINDS)
def test_half_precision(kind):
    model = make(kind, (3, 2)).bfloat16()
    apply_edits(model, EDITS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model['moe'](torch.randn(ROWS, I).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (Edit('moe', 6, 0, scale=1), 'expert=6 is out of range; it has 6 experts'),
        (Edit('moe', 5, OUT, scale=1), 'output=4 is out of range; an expert has 4 outputs'),
        (Edit('mo', 5, 0, scale=1), 'no layer "mo" has experts; there is moe'),
    ],
)
def test_mistakes(edit, message):
    with pytest.raises(ConfigError, match=message):
        apply_edits(make('cp', (3, 2)), [edit])


def test_edited_in_inference_mode_and_trained_on():
    model, x = make('cp', 4), torch.randn(ROWS, I).double()
    with torch.inference_mode():
        apply_edits(model, [Edit('moe', 3, 2, scale=0.5)])
    model['moe'](x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_trained_on_after_the_edits_are_undone():
    model, x = make('tr', 4), torch.randn(ROWS, I).double()
    with edit_experts(model, [Edit('moe', 3, 2, scale=0.5)]):
        loss = model['moe'](x).sum()
        loss.backward()
    model['moe'](x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_layer_that_is_no_name():
    with pytest.raises(ConfigError, match='layer=1 must be'):
        Edit(1, 3, 2, scale=0.5)
