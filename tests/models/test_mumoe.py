"""MMPretrain's classes with μMoEs in them."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import LinearClsHead, MlpMixer
from mmpretrain.structures import DataSample

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import CPMuMoE, MuMoEMLP, TRMuMoE, find_expert_layers
from mmdet_moe.moe.mumoe import CPFactors, TRFactors

ARCH = {'embed_dims': 12, 'num_layers': 2, 'tokens_mlp_dims': 6, 'channels_mlp_dims': 20}
MIXER = {'arch': ARCH, 'img_size': 16, 'patch_size': 4}


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def head(**options):
    options = {'num_classes': 7, 'in_channels': 12, 'num_experts': 3, 'rank': 4, **options}
    return MODELS.build({'type': 'mmdet_moe.MuMoEClsHead', **options})


def mixer(**options):
    return MODELS.build({'type': 'mmdet_moe.MuMoEMlpMixer', **MIXER, 'num_experts': 3, **options})


@pytest.mark.parametrize(('factorisation', 'kind'), [('cp', CPMuMoE), ('tr', TRMuMoE)])
def test_head(factorisation, kind):
    """Losses, accuracies and predictions are those of a linear head with the same scores."""
    options = {'loss': {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1}, 'topk': (1, 2)}
    model = head(factorisation=factorisation, cal_acc=True, **options)
    model.init_weights()
    assert type(model) is LinearClsHead
    assert type(model.fc) is kind
    dense = MODELS.build(
        {'type': 'LinearClsHead', 'num_classes': 7, 'in_channels': 12, 'cal_acc': True, **options}
    )
    dense.fc = model.fc
    features = (torch.randn(5, 12),)
    samples = [DataSample().set_gt_label(i) for i in range(5)]
    losses = model.loss(features, samples)
    assert set(losses) == {'loss', 'accuracy_top-1', 'accuracy_top-2'}
    assert losses == dense.loss(features, samples)
    losses['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())
    for a, b in zip(model.eval().predict(features), dense.eval().predict(features), strict=True):
        assert torch.equal(a.pred_score, b.pred_score)


def test_head_has_no_more_parameters_by_default():
    model = head(in_channels=64, num_classes=100, rank='match')
    assert 0.95 * 6500 < sum(p.numel() for p in model.parameters()) <= 6500


def test_initial_weights_are_those_of_the_paper():
    model = head(in_channels=256, rank=64, num_experts=(40, 3))
    model.init_weights()
    first, second, input, _ = model.fc.experts.factors
    assert abs(first.mean() - 1) < 0.1
    assert abs(second.std() - 0.01) < 0.002
    assert input.abs().max() <= 1 / 16


@pytest.mark.parametrize(('factorisation', 'kind'), [('cp', CPFactors), ('tr', TRFactors)])
def test_mixer(factorisation, kind):
    model = mixer(factorisation=factorisation, rank=2, norm='ln')
    assert type(model) is MlpMixer
    layers = find_expert_layers(model)
    names = [f'layers.{i}.{part}_mix.layers' for i in range(2) for part in ('token', 'channel')]
    assert list(layers) == names
    for name, layer in layers.items():
        assert type(layer) is MuMoEMLP
        assert type(layer.experts) is kind
        size, hidden = (16, 6) if 'token' in name else (12, 20)
        sizes = layer.in_features, layer.hidden.out_features, layer.out_features
        assert sizes == (size, hidden, size)
        assert layer.gate.norm == 'ln'
    model.init_weights()
    # Blocks by hand, with MMPretrain's own order of norms, transposes and shortcuts.
    images = torch.randn(2, 3, 16, 16)
    x = model.patch_embed(images)[0]
    for block in model.layers:
        token, channel = block.token_mix.layers, block.channel_mix.layers
        x = x + token(block.norm1(x).mT).mT
        x = x + channel(block.norm2(x))
    (y,) = model(images)
    torch.testing.assert_close(y, model.norm1(x).mT)
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mixer_has_no_more_parameters_by_default():
    arch = {'embed_dims': 64, 'num_layers': 1, 'tokens_mlp_dims': 32, 'channels_mlp_dims': 128}
    model = mixer(arch=arch, num_experts=4)
    for layer in find_expert_layers(model).values():
        sizes = layer.in_features, layer.hidden.out_features
        dense = 2 * sizes[0] * sizes[1] + sum(sizes)
        assert 0.8 * dense < sum(p.numel() for p in layer.parameters()) <= dense


@pytest.mark.parametrize('build', [head, mixer])
def test_bad_options(build):
    with pytest.raises(ConfigError, match=r"factorisation='x' is unknown; use one of \('cp', 'tr'"):
        build(factorisation='x')
    with pytest.raises(ConfigError, match='rank=0 must be an integer of at least 1'):
        build(rank=0)
    with pytest.raises(TypeError, match='top_k'):
        build(top_k=2)
