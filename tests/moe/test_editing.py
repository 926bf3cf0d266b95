"""Edited experts, against every expert computed by itself and summed by hand."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.transformer import FFN
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    ConvExperts,
    Edit,
    LinearExperts,
    MLPExperts,
    MoELayer,
    apply_edits,
    edit_experts,
    find_moe_layers,
)
from mmdet_moe.moe.surgery import add_experts

E, K, C, OUT = 3, 2, 6, 5  # experts, chosen, inputs, outputs


def moe(expert, granularity='image', **kwargs):
    return MoELayer(expert, E, K, in_channels=C, granularity=granularity, **kwargs)


def conv_module(**kwargs):
    return ConvModule(C, OUT, 3, padding=1, **kwargs)


class Projecting(nn.Module):
    """The end of a residual block, with a projection beside it."""

    def __init__(self, relu, channels=OUT):
        super().__init__()
        self.conv = nn.Conv2d(channels, OUT, 3, padding=1)
        self.norm = nn.BatchNorm2d(OUT)
        self.projection = nn.Conv2d(channels, OUT, 1, bias=False)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + self.projection(x))


#: By name: a layer, an input, and how its expert e computes what it gives for one input.
SPARSE = {
    'linear': (
        lambda: moe(LinearExperts(C, OUT, E), 'token'),
        (2, 4, C),
        lambda m, e, x: F.linear(x, m.weight[e], m.bias[e]),
    ),
    'linear of pixels': (
        lambda: moe(LinearExperts(C, OUT, E), 'pixel'),
        (2, C, 4, 4),
        lambda m, e, x: F.conv2d(x, m.weight[e][:, :, None, None], m.bias[e]),
    ),
    'mlp': (
        lambda: moe(MLPExperts(C, 7, OUT, E, activation='GELU'), 'token'),
        (9, C),
        lambda m, e, x: F.linear(
            F.gelu(F.linear(x, m.layers[0].weight[e], m.layers[0].bias[e])),
            m.layers[1].weight[e],
            m.layers[1].bias[e],
        ),
    ),
    'conv': (
        lambda: moe(ConvExperts(C, OUT, 3, E, padding=1)),
        (16, C, 5, 5),
        lambda m, e, x: F.conv2d(x, m.weight[e], m.bias[e], padding=1),
    ),
    'mixed kernels': (
        lambda: moe(ConvExperts(C, OUT, 3, E, padding=1, impl='views')),
        (16, C, 5, 5),
        lambda m, e, x: F.conv2d(x, m.weight[e], m.bias[e], padding=1),
    ),
    'patches': (
        lambda: moe(nn.Sequential(nn.Conv2d(C, OUT, 1)), 'patch', grid_size=2),
        (16, C, 6, 6),
        lambda m, e, x: m[e](x),
    ),
    'shared, shortcut': (
        lambda: moe(
            nn.Conv2d(C, OUT, 1), shared=[nn.Conv2d(C, OUT, 1)], shortcut=nn.Conv2d(C, OUT, 1)
        ),
        (16, C, 4, 4),
        lambda m, e, x: m[e](x),
    ),
    'norm': (lambda: moe(conv_module(norm_cfg={'type': 'BN'}, act_cfg=None)), (16, C, 5, 5), None),
    'group norm': (
        lambda: moe(conv_module(norm_cfg={'type': 'GN', 'num_groups': 5}, act_cfg=None)),
        (16, C, 5, 5),
        None,
    ),
    'layer norm': (
        lambda: moe(nn.Sequential(nn.Linear(C, OUT), nn.LayerNorm(OUT)), 'token'),
        (2, 4, C),
        None,
    ),
    'residual': (
        lambda: moe(nn.Sequential(conv_module(), Projecting(False))),
        (16, C, 5, 5),
        None,
    ),
    'vectors of an image': (lambda: moe(nn.Linear(C, OUT)), (16, C), None),
}  # fmt: skip
EDITS = [
    Edit('moe', 1, 2, scale=-1.5),
    Edit('moe', 1, 2, add=0.7),
    Edit('moe', 1, 2, zero=True),
    Edit('moe', 1, None, scale=2),
    Edit('moe', 1, None, add=-0.3),
    Edit('moe', 1, None, zero=True),
]


def changed(contribution, edit, dim):
    """By plain indexing."""
    result = contribution.movedim(dim, -1).clone()
    outputs = range(result.shape[-1]) if edit.output is None else [edit.output]
    for o in outputs:
        if edit.zero:
            result[..., o] = 0
        elif edit.scale is not None:
            result[..., o] *= edit.scale
        else:
            result[..., o] += edit.add
    return result.movedim(-1, dim)


def decisions(layer, x, expert):
    """The expert's weight for each number of an output: as many dimensions as that has."""
    weights = layer.routing.dense_weights()[:, expert]
    if layer.granularity == 'token':
        return weights.reshape(*x.shape[:-1], 1)
    if layer.granularity == 'image':
        return weights.reshape(-1, *[1] * (x.dim() - 1))
    side = round((len(weights) / len(x)) ** 0.5)  # a grid of equal cells
    cells = weights.reshape(len(x), 1, side, side)
    times = x.shape[-1] // side
    return cells.repeat_interleave(times, 2).repeat_interleave(times, 3)


def state_of(model):
    return copy.deepcopy(model.state_dict())


def assert_same_state(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in now)


@pytest.mark.parametrize('edit', EDITS, ids=str)
@pytest.mark.parametrize('name', SPARSE)
@torch.no_grad()
def test_sparse_experts(name, edit, randomise):
    build, shape, expert = SPARSE[name]
    model = nn.ModuleDict({'moe': randomise(build())}).double().eval()
    layer = model['moe']
    expert = expert or (lambda experts, e, x: experts[e](x))
    shift = torch.randn(*shape[:2], *[1] * (len(shape) - 2))  # or all images look alike to a router
    x = (torch.randn(shape) + 3 * shift).double()
    before, state = layer(x), state_of(model)
    dim = -1 if layer.granularity == 'token' else 1
    own = expert(layer.experts, edit.expert, x)
    change = decisions(layer, x, edit.expert) * (changed(own, edit, dim) - own)
    change /= 1 + len(layer.shared or ())
    assert change.any()
    with edit_experts(model, [edit]) as edited:
        assert edited is model
        torch.testing.assert_close(layer(x), before + change)
    assert_same_state(model, state)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('edit', EDITS, ids=str)
def test_precisions(edit, dtype):
    model = nn.ModuleDict({'moe': moe(ConvExperts(C, OUT, 3, E), 'image')}).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_edits(model, [edit])
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert changed
    assert all(name.startswith('moe.experts.') for name in changed)


def test_edits_in_half_precision():
    """What follows the last layer is seen, and a change that rounding would undo refused."""
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleDict({'moe': moe(conv_module(norm_cfg={'type': 'BN'}))}).to(dtype)
        state = state_of(model)
        with pytest.raises(ConfigError, match=r'what follows .*ReLU'):
            apply_edits(model, [Edit('moe', 0, 1, add=0.05)])
        assert_same_state(model, state)
    model = nn.ModuleDict({'moe': moe(LinearExperts(C, OUT, E), 'token')}).bfloat16()
    with torch.no_grad():
        model['moe'].experts.bias.fill_(4)
    state = state_of(model)
    with pytest.raises(ConfigError, match=r'bfloat16 rounds so small a change .* away; edit'):
        apply_edits(model, [Edit('moe', 0, 1, add=0.01)])
    assert_same_state(model, state)


def test_edits_compose_in_order():
    model = nn.ModuleDict({'moe': moe(LinearExperts(C, OUT, E), 'token')})
    weight, bias = model['moe'].experts.weight[1, 2].clone(), model['moe'].experts.bias[1, 2].item()
    edits = [
        Edit('moe', 1, 2, add=0.5), Edit('moe', 1, 2, scale=2), Edit('moe', 0, None, zero=True)
    ]  # fmt: skip
    apply_edits(model, edits)
    experts = model['moe'].experts
    torch.testing.assert_close(experts.weight[1, 2], 2 * weight)
    assert experts.bias[1, 2].item() == pytest.approx(2 * (bias + 0.5))
    assert not experts.weight[0].any()
    assert not experts.bias[0].any()


def test_scaling_goes_through_a_relu_and_adding_does_not():
    model = nn.ModuleDict({'moe': moe(conv_module(norm_cfg={'type': 'BN'}))})
    state = state_of(model)
    for edit in (Edit('moe', 0, 1, scale=3.0), Edit('moe', 0, 1, zero=True)):
        with edit_experts(model, [edit]):
            pass
    for edit in (Edit('moe', 0, 1, add=0.5), Edit('moe', 0, 1, scale=-1.0)):
        with pytest.raises(ConfigError, match=r'expert 0 of layer "moe".*what follows .*ReLU'):
            apply_edits(model, [Edit('moe', 2, 0, scale=2.0), edit])
        assert_same_state(model, state)  # the first edit, too, has been undone


def test_scaling_goes_through_a_relu_behind_a_sum(randomise):
    model = randomise(nn.ModuleDict({'moe': moe(Projecting(True, C))})).eval()
    x = torch.randn(16, C, 5, 5)
    expert = model['moe'].experts[0]
    expected = expert(x)
    expected[:, 1] *= 3
    with edit_experts(model, [Edit('moe', 0, 1, scale=3)]):
        torch.testing.assert_close(expert(x), expected)
    with pytest.raises(
        ConfigError, match='last layer, BatchNorm2d and Conv2d, changes the outcome'
    ):
        apply_edits(model, [Edit('moe', 0, 1, add=3)])


def test_a_sum_with_the_input_can_be_added_to_and_not_scaled():
    ffn = FFN(C, 8, num_fcs=2, act_cfg={'type': 'GELU'})
    model = nn.ModuleDict({'moe': moe(ffn, 'token')})
    apply_edits(model, [Edit('moe', 1, 3, add=0.25)])
    with pytest.raises(ConfigError, match='a sum with its input'):
        apply_edits(model, [Edit('moe', 1, 3, scale=0.5)])


def test_restored_after_an_exception_and_in_training():
    model = nn.ModuleDict({'moe': moe(conv_module(norm_cfg={'type': 'BN'}))}).train()
    state, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(KeyError), edit_experts(model, [Edit('moe', 0, None, scale=2.0)]):
        raise KeyError
    assert_same_state(model, state)  # with the statistics of the normalisation
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())


def test_gradients_flow_through_an_edited_model():
    model = nn.ModuleDict({'moe': moe(LinearExperts(C, OUT, E), 'token')})
    with edit_experts(model, [Edit('moe', 0, 1, scale=2.0)]):
        model['moe'](torch.randn(8, C)).sum().backward()
    assert model['moe'].experts.weight.grad.any()


def test_experts_by_path():
    model = nn.Sequential(nn.Flatten(), nn.Linear(C, OUT))
    add_experts(model, [{'at': '1', 'num_experts': E, 'top_k': K, 'granularity': 'token'}])
    (name,) = find_moe_layers(model)
    x = torch.randn(4, C)
    before = model(x)
    with edit_experts(model, [Edit(name, e, 0, add=1.0) for e in range(E)]):
        expected = before + torch.eye(OUT)[0]  # the weights of the experts sum to 1
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda: Edit('moe', 0, 0), 'exactly one of scale, add and zero=True, not none'),
        (lambda: Edit('moe', 0, 0, scale=1, zero=True), 'not scale and zero'),
        (lambda: Edit('moe', 0, 0, scale=1, add=1), 'not scale and add'),
        (lambda: Edit('moe', 0, 0, scale=float('nan')), 'scale=nan must be a finite number'),
        (lambda: Edit('moe', 0, 0, add=float('inf')), 'add=inf must be a finite number'),
        (lambda: Edit('moe', 0, 0, zero=1), 'zero=1 must be True or False'),
        (lambda: Edit('moe', -1, 0, scale=1), 'expert=-1 must be an integer of at least 0'),
        (lambda: Edit('moe', 0, 1.0, scale=1), 'output=1.0 must be an integer'),
        (lambda: Edit('meo', 0, 0, scale=1), 'no layer "meo" has experts; there is moe'),
        (lambda: Edit('moe', E, 0, scale=1), 'expert=3 is out of range; it has 3 experts'),
        (lambda: Edit('moe', 0, OUT, scale=1), 'output=5 is out of range; an expert has 5 outputs'),
    ],
)
def test_mistakes(edit, message):
    model = nn.ModuleDict({'moe': moe(LinearExperts(C, OUT, E), 'token')})
    state = state_of(model)
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_edits(model, [Edit('moe', 0, 0, scale=2), edit()])
    assert_same_state(model, state)


def test_a_model_without_experts():
    with pytest.raises(ConfigError, match='no layer "0" has experts; Sequential has none'):
        apply_edits(nn.Sequential(nn.Linear(2, 2)), [Edit('0', 0, 0, scale=1)])


def tied():
    experts = [nn.Sequential(nn.Conv2d(C, OUT, 1)) for _ in range(E)]
    experts[2][0] = experts[1][0]
    return moe(experts)


@pytest.mark.parametrize(
    ('layer', 'edit', 'message'),
    [
        (
            lambda: moe(LinearExperts(C, OUT, E, bias=False), 'token'),
            Edit('moe', 1, 0, add=1),
            'needs a bias, which its last layer, LinearExperts, has not',
        ),
        (tied, Edit('moe', 1, 0, scale=2), 'last layer, Conv2d, are used elsewhere'),
        (
            lambda: moe(nn.Sequential(nn.ConvTranspose2d(C, OUT, 1))),
            Edit('moe', 1, 0, scale=2),
            'its last layer with weights is ConvTranspose2d',
        ),
        (
            lambda: moe(nn.Sequential(nn.Conv2d(C, 4, 1), nn.PixelShuffle(2))),
            Edit('moe', 1, 0, scale=2),
            'Conv2d, has 4 outputs, of which it makes 1',
        ),
        (
            lambda: moe(nn.Sequential(nn.Conv2d(C, OUT, 1), nn.InstanceNorm2d(OUT))),
            Edit('moe', 1, 0, scale=2),
            'what follows its last layer, Conv2d, changes the outcome',
        ),
        (
            lambda: moe(nn.Sequential(nn.Conv2d(C, OUT, 1), nn.PReLU())),
            Edit('moe', 1, 0, scale=2),
            'its last layer with weights is PReLU',
        ),
        (
            lambda: moe([nn.Identity() for _ in range(E)]),
            Edit('moe', 1, 0, scale=2),
            'nothing in it has weights',
        ),
        (
            lambda: moe(nn.Sequential(nn.Conv2d(C, OUT, 64))),
            Edit('moe', 1, 0, scale=2),
            r'does not run on inputs \(2, 6, 32, 32\)',
        ),
    ],
)
def test_experts_that_cannot_be_edited(layer, edit, message):
    model = nn.ModuleDict({'moe': layer()})
    state = state_of(model)
    with pytest.raises(ConfigError, match=rf'expert 1 of layer "moe" cannot be edited.*{message}'):
        apply_edits(model, [edit])
    assert_same_state(model, state)
