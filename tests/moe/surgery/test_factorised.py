"""Modules of models that become μMoEs: the sizes are theirs, everything else stays."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.transformer import FFN
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    CPMuMoE,
    MuMoEConv1x1,
    MuMoEMLP,
    TRMuMoE,
    add_experts,
    find_expert_layers,
    find_moe_layers,
    report_of,
)
from mmdet_moe.moe.mumoe import CPFactors, TRFactors

FOUR = {'num_experts': 4, 'rank': 2}
CP, TR = {'type': 'CPMuMoE', **FOUR}, {'type': 'mmdet_moe.TRMuMoE', **FOUR}


def mlp(hidden=10, act=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Linear(6, hidden, bias=bias), act(), nn.Dropout(0.25), nn.Linear(hidden, 5, bias=bias)
    )


class Twice(nn.Module):
    """Two linear layers and an activation, but not one behind the other."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.act(self.first(x)) + x)


def model_of(module):
    return nn.ModuleDict({'part': module, 'other': nn.Linear(6, 6)})


def replaced(module, options=CP):
    model = model_of(module)
    add_experts(model, {'part': options})
    return model['part']


@pytest.mark.parametrize(('options', 'kind'), [(CP, CPMuMoE), (TR, TRMuMoE)])
@pytest.mark.parametrize('bias', [True, False])
def test_linear_layer(bias, options, kind):
    layer = replaced(nn.Linear(6, 5, bias=bias), options)
    assert type(layer) is kind
    assert (layer.in_features, layer.out_features, layer.experts.bias) == (6, 5, bias)
    assert (layer.name, layer.replaces, layer.num_experts) == ('part', 'Linear', 4)
    assert layer(torch.randn(3, 6)).shape == (3, 5)


@pytest.mark.parametrize(('options', 'kind'), [(CP, CPFactors), (TR, TRFactors)])
@pytest.mark.parametrize(
    'conv',
    [
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(6, 5, 1, stride=2, bias=False),
        ConvModule(6, 5, 1, act_cfg=None),
    ],
    ids=['plain', 'stride', 'mmcv'],
)
def test_convolution(conv, options, kind):
    conv = copy.deepcopy(conv)
    x = torch.randn(2, 6, 5, 4)
    y = conv(x)
    layer = replaced(conv, options)
    assert type(layer) is MuMoEConv1x1
    assert type(layer.experts) is kind
    assert layer(x).shape == y.shape


@pytest.mark.parametrize('act', [nn.ReLU, nn.GELU])
@pytest.mark.parametrize('bias', [True, False])
def test_mlp(bias, act):
    layer = replaced(mlp(act=act, bias=bias))
    assert type(layer) is MuMoEMLP
    sizes = [(f.in_features, f.out_features, f.bias) for f in (layer.hidden, layer.experts)]
    assert sizes == [(6, 10, bias), (10, 5, bias)]
    assert type(layer.act) is act
    assert (layer.hidden_drop.p, type(layer.drop)) == (0.25, nn.Identity)
    assert len(list(layer.gate.parameters())) == 1


def test_shortcut_around_an_mlp_stays():
    """mmcv's FFN adds its input, or what else it gets, and drops paths."""
    ffn = FFN(6, 10, act_cfg={'type': 'GELU'}, add_identity=True)
    model = model_of(ffn)
    add_experts(model, {'part': CP})
    assert list(find_expert_layers(model)) == ['part.layers']
    assert model['part'] is ffn
    x, identity = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    layer = ffn.layers.eval()
    torch.testing.assert_close(ffn(x, identity), identity + layer(x))


def test_the_only_weights_inside_of_a_module():
    model = model_of(ConvModule(6, 5, 1))  # with an activation
    add_experts(model, {'part': CP})
    assert list(find_expert_layers(model)) == ['part.conv']
    assert (model['part'](torch.randn(2, 6, 3, 3)) >= 0).all()


def test_hooks_are_not_lost():
    """Those of what goes are refused; of a module around it, they go on being run."""
    mlp = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6))
    linear, conv = nn.Linear(6, 5), nn.Conv2d(6, 5, 1)
    for part, with_hook in ((linear, linear), (conv, conv), (mlp, mlp[2]), (mlp, mlp)):
        handle = with_hook.register_forward_hook(lambda *_: None)
        kind = type(with_hook).__name__
        with pytest.raises(ConfigError, match=f'"part": {kind} has forward hooks, which its exper'):
            add_experts(model_of(part), {'part': CP})
        handle.remove()
        add_experts(model_of(part), {'part': CP})
    around = ConvModule(6, 5, 1)
    for part, kept, x in ((around, around, (2, 6, 3, 3)), (mlp, mlp[1], (2, 6))):
        seen, model = [], model_of(part)
        kept.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        add_experts(model, {'part': CP})
        seen.clear()  # it was tried out
        model['part'](torch.randn(x))
        assert seen == [1]


def test_everything_else_stays():
    model = model_of(nn.Linear(6, 5)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith('other')}
    add_experts(model, [{'at': 'part', **CP}, {'at': 'other', 'num_experts': 3, 'top_k': 2}])
    assert list(find_expert_layers(model)) == ['part', 'other']
    assert list(find_moe_layers(model)) == ['other']
    assert torch.equal(model['other'].experts[0].weight, before['other.weight'])
    assert not model['part'].training
    model = model_of(nn.Linear(6, 5)).double()
    add_experts(model, {'part': CP})
    assert model['part'](torch.randn(3, 6).double()).dtype == torch.float64


def test_matches_the_parameters_of_what_stood_there():
    model = model_of(nn.Linear(60, 50))
    (row,) = add_experts(model, {'part': {'type': 'CPMuMoE', 'num_experts': (4, 3)}}).rows
    assert row.dense == 60 * 50 + 50
    gate, dims = 60 * 7, 4 + 3 + 61 + 50
    rank = (row.dense - gate) // dims
    assert row.total == row.active == gate + dims * rank
    assert (row.num_experts, row.levels) == (12, (4, 3))


def test_report():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    tokens = {'num_experts': 3, 'top_k': 2, 'granularity': 'token'}
    layer = {'type': 'CPMuMoE', 'num_experts': (4, 3), 'rank': 2}
    add_experts(model, {'0': tokens, '1': layer})
    report = report_of(model, lambda: model(torch.randn(10, 6)))
    assert report.rows[1].dense_flops == 10 * 2 * 6 * 5
    assert report.rows[1].flops == 10 * 2 * (6 * 7 + 2 * (4 + 3 + 6 + 5))
    sparse, factorised = str(report).splitlines()[1:3]
    assert sparse.split()[:4] == ['0', 'Linear', '3', '2']
    cells = ['1', 'Linear', '4', '×', '3', 'all', '0', 'token', '-', '0.00']
    assert factorised.split()[:10] == cells


@pytest.mark.parametrize(
    ('module', 'message'),
    [
        (nn.Conv2d(6, 5, 3, padding=1), r'kernel \(3, 3\).* choose a 1×1 convolution'),
        (nn.Conv2d(6, 5, 1, padding=1), 'cannot become a μMoE; choose a 1×1'),
        (nn.Conv2d(6, 6, 1, groups=2), 'and 2 groups cannot become a μMoE'),
        (nn.Conv2d(6, 5, 1, stride=(1, 2)), r'stride \(1, 2\)'),
        (nn.Sequential(*mlp(), nn.ReLU()), r'no MLP of two linear layers .*, such as 0'),
        (Twice(), '"part": Twice is no linear layer'),
        (nn.BatchNorm1d(6), 'BatchNorm1d is no linear layer'),
        (
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)),
            'no MLP of two linear',
        ),
        (nn.ModuleList([nn.Linear(6, 5)]), r'"part" is a list, .* name its parts: "part\.\*"'),
    ],
    ids=str,
)
def test_what_cannot_become_one(module, message):
    with pytest.raises(ConfigError, match=message):
        replaced(module)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'type': 'SoftMoE'}, r"type='SoftMoE'; use one of \('CPMuMoE', 'TRMuMoE'\)"),
        ({'top_k': 2}, 'has options top_k that CPMuMoE does not know; there are num_experts'),
        ({'num_experts': None}, 'needs num_experts'),
        ({'num_experts': 8.0}, r'num_experts=8\.0 must be an integer'),
        ({'rank': 'match'}, '"part": CPMuMoE: rank=\'match\' has 35 parameters to spend, .* gate'),
        ({'rank': 0}, '"part": CPMuMoE: rank=0 must be'),
    ],
    ids=str,
)
def test_bad_options(options, message):
    options = {k: v for k, v in {**CP, **options}.items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        replaced(nn.Linear(6, 5), options)


def test_activation_with_weights():
    layer = replaced(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)))
    assert not any(p.is_meta for p in layer.parameters())
    assert layer(torch.randn(4, 6)).shape == (4, 5)


def test_named_padding_is_none():
    layer = replaced(nn.Conv2d(6, 5, 1, padding='same'))
    assert layer(torch.randn(2, 6, 3, 4)).shape == (2, 5, 3, 4)


def test_frozen_layer_is_told(capsys):
    replaced(nn.Linear(6, 5).requires_grad_(False))
    assert 'part is frozen' in ''.join(capsys.readouterr())


def test_siblings_are_refused():
    model = nn.ModuleDict({'a': nn.Linear(6, 6), 'b': nn.Linear(6, 6)})
    with pytest.raises(ConfigError, match='names siblings, of which only sparse experts'):
        add_experts(model, {'{a,b}': CP})
