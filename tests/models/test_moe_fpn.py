"""MoEFPN against MMDetection's FPN with the same weights."""

import pytest
import torch
from copies import check_same
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint, load_state_dict

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ModuleExperts, MoELayer, find_moe_layers

CHANNELS = [4, 6, 8]
SIZES = [(25, 31), (13, 16), (7, 8)]
FPN = {'in_channels': CHANNELS, 'out_channels': 6, 'num_outs': 5, 'add_extra_convs': 'on_output'}
BN = {'norm_cfg': {'type': 'BN'}, 'act_cfg': {'type': 'ReLU'}}


def build(moe=None, **options):
    name = 'mmdet.FPN' if moe is None else 'mmdet_moe.MoEFPN'
    return MODELS.build({'type': name, **FPN, **options, **(moe or {})})


def inputs():
    return [torch.randn(2, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]


@pytest.mark.parametrize('norm', [{}, BN], ids=['plain', 'bn'])
@pytest.mark.parametrize(
    'moe',
    [
        {'num_experts': 1, 'top_k': 1},
        {'num_experts': 4, 'top_k': 2},
        {'num_experts': 4, 'top_k': 4},
        {'num_experts': 4, 'top_k': 2, 'moe_levels': [0, 2, 4]},
        {'num_experts': 1, 'top_k': 1, 'granularity': 'patch', 'grid_size': 3},
        {'num_experts': 4, 'top_k': 2, 'granularity': 'patch', 'grid_size': 2},
        {'num_experts': 4, 'top_k': 2, 'granularity': 'patch', 'grid_size': 3},
        {'num_experts': 4, 'top_k': 2, 'granularity': 'patch', 'grid_size': 4},
    ],
    ids=str,
)
def test_same_as_dense(moe, norm, randomise, tmp_path):
    dense, model = randomise(build(**norm)).eval(), randomise(build(moe, **norm)).eval()
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'))
    check_same(dense, model, inputs(), rtol=0)


def test_different_experts_on_patches(randomise):
    """Each patch of each level: its own mixture of the whole-map outputs of the experts."""
    model = build({'num_experts': 3, 'top_k': 2, 'granularity': 'patch', 'grid_size': 2}, **BN)
    randomise(model).eval()
    seen = {}
    for layer in find_moe_layers(model).values():
        layer.register_forward_hook(lambda m, args, y: seen.update({m.name: (m, args[0], y)}))
    model(inputs())
    assert list(seen) == ['fpn_convs.0', 'fpn_convs.1', 'fpn_convs.2']
    for layer, x, y in seen.values():
        whole = torch.stack([expert(x) for expert in layer.experts], dim=1)
        height, width = x.shape[2:]
        weights = layer.routing.dense_weights().view(2, 2, 2, 3)  # image, row, column, expert
        rows = torch.arange(height) >= height // 2
        columns = torch.arange(width) >= width // 2
        per_pixel = weights[:, rows.long()][:, :, columns.long()].permute(0, 3, 1, 2)
        torch.testing.assert_close(y, (per_pixel[:, :, None] * whole).sum(1), rtol=1e-5, atol=1e-5)


def test_noise_perturbs_the_copies(randomise):
    dense, model = randomise(build()), build({'upcycle_noise': 0.1})
    load_state_dict(model, dense.state_dict())
    weights = model.fpn_convs[0].experts.weight
    for weight in weights:
        relative = (weight - dense.fpn_convs[0].conv.weight).std() / weights[0].std()
        assert 0.05 < relative < 0.15
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize('norm', [{}, BN], ids=['plain', 'bn'])
@pytest.mark.parametrize('expert_init', ['shared', 'independent'])
def test_initial_weights(norm, expert_init):
    """Every expert as FPN's convolutions: Xavier uniform; alike or each with its own."""
    model = build({'expert_init': expert_init}, **norm)
    model.init_weights()
    for layer in (model.fpn_convs[0], model.fpn_convs[2]):
        if norm:
            assert isinstance(layer.experts, ModuleExperts)
            weights = torch.stack([expert.conv.weight for expert in layer.experts])
        else:
            weights = layer.experts.weight
            assert not layer.experts.bias.any()
        limit = (6 / (6 * 9 + 6 * 9)) ** 0.5  # fan in and fan out of a 3×3 convolution, 6 to 6
        assert 0.9 * limit < weights.abs().max() <= limit
        # The standard deviation of a uniform distribution; 324 draws per expert.
        assert weights[3].std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
        assert torch.equal(weights[0], weights[3]) == (expert_init == 'shared')


@pytest.mark.parametrize('expert_init', ['shared', 'independent'])
def test_pretrained_weights_stay(expert_init, randomise, tmp_path):
    """Of a dense neck and of an MoE neck, loaded by ``init_cfg``."""
    dense, moe = randomise(build()), randomise(build({'num_experts': 2}))
    for source in (dense, moe):
        torch.save({'state_dict': source.state_dict()}, tmp_path / 'neck.pth')
        init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'neck.pth')}
        model = build({'num_experts': 2, 'expert_init': expert_init}, init_cfg=init_cfg)
        model.init_weights()
        for level, layer in enumerate(model.fpn_convs[:3]):
            for e in range(2):
                expected = source.fpn_convs[level]
                expected = expected.conv.weight if source is dense else expected.experts.weight[e]
                assert torch.equal(layer.experts.weight[e], expected)


def test_initialisation_of_other_modules_is_not_for_the_experts():
    init_cfg = {
        'type': 'Constant',
        'layer': 'Conv2d',
        'val': 0.5,
        'override': {'type': 'Constant', 'name': 'lateral_convs', 'val': 0.25},
    }
    model = build({}, init_cfg=init_cfg)
    model.init_weights()
    assert (model.lateral_convs[0].conv.weight == 0.25).all()
    assert (model.fpn_convs[0].experts.weight == 0.5).all()


def test_convolutions_are_evaluated_together():
    """Plain ones in the way that is asked for; with normalisation one after the other."""
    model = build({'impl': 'grouped'})
    assert {layer.experts.impl for layer in find_moe_layers(model).values()} == {'grouped'}
    with pytest.raises(ConfigError, match="impl='fast' is unknown"):
        build({'impl': 'fast'})
    with pytest.raises(ConfigError, match="impl='views' is unknown for ConvModule, which is"):
        build({'impl': 'views'}, **BN)


def test_checkpoints_of_lists_of_experts_load(randomise):
    model = randomise(build({'num_experts': 2}))
    listed = {}
    for name, value in model.state_dict().items():
        if '.experts.' in name:
            prefix, inner = name.split('.experts.')
            listed.update({f'{prefix}.experts.{e}.conv.{inner}': v for e, v in enumerate(value)})
        else:
            listed[name] = value
    other = build({'num_experts': 2})
    other.load_state_dict(listed)  # strict
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_default_levels_are_those_of_the_laterals():
    model = build({})
    assert [isinstance(conv, MoELayer) for conv in model.fpn_convs] == [True] * 3 + [False] * 2
    routers = {id(layer.router) for layer in find_moe_layers(model).values()}
    assert len(routers) == 3


@pytest.mark.parametrize('levels', [(), (0, 5), (-1,)])
def test_unknown_levels_are_refused(levels):
    with pytest.raises(ConfigError, match=r'moe_levels=.* must name some of 0 to 4'):
        build({'moe_levels': levels})
