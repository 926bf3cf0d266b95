"""MoEResNet against MMDetection's ResNet with the same weights."""

import pytest
import torch
from copies import check_same
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint, load_state_dict

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer

# Narrow; the third stage has stride 2, the second keeps the size.
RESNET = {
    'depth': 18,
    'num_stages': 3,
    'base_channels': 4,
    'stem_channels': 4,
    'strides': (1, 1, 2),
    'dilations': (1, 1, 1),
    'out_indices': (0, 1, 2),
    'norm_eval': True,
}
BOTTLENECK = {**RESNET, 'depth': 50}


def build(moe=None, **options):
    name = 'mmdet.ResNet' if moe is None else 'mmdet_moe.MoEResNet'
    return MODELS.build({'type': name, **RESNET, **options, **(moe or {})})


def image(size=(98, 122)):
    return torch.randn(2, 3, *size)  # by default 25×31 behind the stem


@pytest.mark.parametrize('options', [RESNET, BOTTLENECK], ids=['basic blocks', 'bottlenecks'])
@pytest.mark.parametrize(
    'moe',
    [
        {'num_experts': 1, 'top_k': 1, 'moe_stages': (3,)},
        {'num_experts': 4, 'top_k': 2, 'moe_stages': (1, 2, 3)},
        {'num_experts': 4, 'top_k': 2, 'moe_stages': (3,), 'granularity': 'patch', 'grid_size': 2},
        {'num_experts': 1, 'top_k': 1, 'moe_stages': (2,), 'granularity': 'patch', 'grid_size': 3},
        {'num_experts': 4, 'top_k': 3, 'moe_stages': (2,), 'granularity': 'patch', 'grid_size': 4},
    ],
    ids=str,
)
def test_same_as_dense(moe, options, randomise, tmp_path):
    dense, model = randomise(build(**options)), randomise(build(moe, **options))
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'))
    dense.train(), model.train()  # norm_eval keeps the statistics
    x = image() if options is RESNET else image((50, 38))
    check_same(dense, model, x, rtol=1e-9)


def test_pretrained_weights_of_the_dense_model(randomise, tmp_path):
    """``init_cfg=dict(type='Pretrained')``, the way every detection config starts."""
    dense = randomise(build())
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    pretrained = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'dense.pth')}
    model = build({'moe_stages': (3,)}, init_cfg=pretrained)
    model.init_weights()
    dense.train(), model.train()
    check_same(dense, model, image(), rtol=1e-9)


@pytest.mark.parametrize('stage', [2, 3])
@pytest.mark.parametrize('granularity', [{}, {'granularity': 'patch', 'grid_size': 3}], ids=str)
def test_residual(stage, granularity, randomise):
    """MoE(x) + shortcut(x); with equal experts the MoE is the dense stage."""
    dense = randomise(build())
    model = randomise(build({'moe_stages': (stage,), 'residual': True, **granularity}))
    load_state_dict(model, dense.state_dict())
    dense.train(False), model.train(False)
    layer = getattr(model, f'layer{stage}')
    features = dense(image())[stage - 2]
    conv, norm = layer.shortcut  # from 4 to 8 or from 8 to 16 channels
    shortcut = torch.nn.functional.conv2d(features, conv.weight, stride=stage - 1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    shortcut = shortcut * scale[:, None, None] + shift[:, None, None]
    expected = getattr(dense, f'layer{stage}')(features) + shortcut
    torch.testing.assert_close(layer(features), expected, rtol=1e-5, atol=1e-5)


def test_residual_identity(randomise):
    """Stage 1 of basic blocks changes neither the channels nor the size."""
    dense, model = build(), build({'moe_stages': (1,), 'residual': True})
    load_state_dict(model, randomise(dense).state_dict())
    x = torch.randn(2, 4, 12, 15)
    dense.train(False), model.train(False)
    torch.testing.assert_close(model.layer1(x), dense.layer1(x) + x, rtol=1e-5, atol=1e-5)


def test_frozen_stages_and_norm_eval():
    model = build({'moe_stages': (1, 3)}, frozen_stages=1)
    model.train()
    assert isinstance(model.layer1, MoELayer)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer3.parameters())
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize('stages', [(), (0,), (4,), (1, 5)])
def test_unknown_stages_are_refused(stages):
    with pytest.raises(ConfigError, match=r'moe_stages=.* must name some of 1 to 3'):
        build({'moe_stages': stages})
