"""MoEResNet_CIFAR against MMPretrain's ResNet_CIFAR and against mixing by hand."""

import math

import pytest
import torch
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models import moe_resnet
from mmdet_moe.moe import ConvExperts, find_moe_layers
from mmdet_moe.moe.flops import count_flops

PAPER = (25, 50, 90, 180)
SMALL = {'depth': 18, 'stem_channels': 8, 'base_channels': 8}


def build(moe=None, **options):
    name = 'ResNet_CIFAR' if moe is None else 'mmdet_moe.MoEResNet_CIFAR'
    return MODELS.build({'type': name, **options, **(moe or {})})


def cost(module, x):
    """Multiplications of the convolutions of one image, added up from shapes."""
    total = 0

    def count(conv, _, output):
        nonlocal total
        total += conv.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        module.eval()(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(('stage', 'channels', 'side'), [
    (1, 64, 8), (2, 64, 8), (3, 128, 4), (4, 256, 2),
])  # fmt: skip
@pytest.mark.parametrize('num_experts', [4, 10])
def test_two_narrow_experts_cost_what_the_stage_does(stage, channels, side, num_experts):
    moe = {'moe_stages': stage, 'expert_channels': PAPER, 'num_experts': num_experts}
    layer = getattr(build(moe, depth=18), f'layer{stage}')
    dense = getattr(build(depth=18), f'layer{stage}')
    x = torch.randn(1, channels, side, side)
    assert layer.num_experts == num_experts
    assert cost(layer, x) == pytest.approx(cost(dense, x), rel=0.1)


@pytest.mark.parametrize('num_experts', [4, 10])
@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_shape_of_the_papers_experts(num_experts, top_k):
    moe = {'moe_stages': (1, 2, 3, 4), 'expert_channels': PAPER, 'num_experts': num_experts}
    model = build({**moe, 'top_k': top_k}, depth=18)
    for stage, (width, out) in enumerate(zip(PAPER, (64, 128, 256, 512), strict=True), start=1):
        layer = getattr(model, f'layer{stage}')
        assert (layer.num_experts, layer.top_k) == (num_experts, top_k)
        for first, last in layer.experts:
            assert first.conv1.stride == ((1, 1) if stage == 1 else (2, 2))
            assert [c.out_channels for c in (first.conv1, first.conv2)] == [width, width]
            assert [c.out_channels for c in (last.conv1, last.conv2)] == [out, out]
            assert last.downsample[0].weight.shape == (out, width, 1, 1)
    x = torch.randn(3, 3, 16, 16)
    assert [tuple(y.shape) for y in model(x)] == [(3, 512, 2, 2)]


@pytest.mark.sweep(keep=1 / 3)
@pytest.mark.parametrize(('depth', 'channels'), [
    (18, (64, 64, 128, 256)), (34, (64, 64, 128, 256)), (50, (64, 256, 512, 1024)),
])  # fmt: skip
@pytest.mark.parametrize('stage', [1, 2, 4])
def test_equal_flops(depth, channels, stage):
    moe = build({'moe_stages': stage, 'num_experts': 3}, depth=depth)
    layer, dense = getattr(moe, f'layer{stage}'), getattr(build(depth=depth), f'layer{stage}')
    x = torch.randn(1, channels[stage - 1], 4, 4)
    expected = cost(dense, x)
    assert cost(layer, x) == pytest.approx(expected, rel=0.02)
    # One channel more or less is farther away from it.
    for change in (-1, 1):
        width = layer.experts[0][0].conv1.out_channels + change
        other = build(
            {'moe_stages': stage, 'num_experts': 2, 'expert_channels': width}, depth=depth
        )
        off = abs(cost(getattr(other, f'layer{stage}'), x) - expected)
        assert off >= abs(cost(layer, x) - expected)


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_cost_of_the_first_convolution(top_k):
    """It becomes k convolutions, on any device."""
    model, x = build({'moe_stages': 0, 'top_k': top_k}, depth=18), torch.randn(1, 3, 32, 32)
    router = 2 * 3 * 4
    assert count_flops(model.conv1, x) == top_k * 2 * cost(build(depth=18).conv1, x) + router


def test_least_width_of_equal_flops():
    """3 of 20 channels: an eighth, rounded up, and the last that is at most 10 % too dear."""
    narrow = {'depth': 18, 'stem_channels': 10, 'base_channels': 10}
    layer = build({'moe_stages': 2, 'top_k': 3}, **narrow).layer2
    x = torch.randn(1, 10, 8, 8)
    assert layer.experts[0][0].conv1.out_channels == 3
    assert 1.05 < cost(layer, x) / cost(build(**narrow).layer2, x) < 1.1


@pytest.mark.parametrize(('depth', 'stage', 'top_k', 'message'), [
    # One channel would do: 1.035 and 1.031 times the cost of the stage.
    (18, 1, 4, r'of stage 1 cost 1\.29 times .* even with 8 instead of 64 channels'),
    (50, 1, 4, r'of stage 1 cost 1\.28 times .* even with 8 instead of 64 channels'),
    (34, 1, 5, r'of stage 1 cost 1\.10 times .* even with 8 instead of 64 channels'),  # 1.104
    (18, 4, 4, r'of stage 4 cost 1\.38 times .* even with 64 instead of 512 channels'),
])  # fmt: skip
def test_equal_flops_that_cannot_be(depth, stage, top_k, message):
    with pytest.raises(ConfigError, match=f"'equal_flops': top_k={top_k} experts {message}"):
        build({'moe_stages': stage, 'num_experts': 5, 'top_k': top_k}, depth=depth)


@pytest.mark.parametrize('stages', [0, 1, 2, 4, (0, 3)], ids=str)
@pytest.mark.parametrize('num_experts', [1, 4])
def test_dense_checkpoint(stages, num_experts, randomise, tmp_path):
    """Experts of the dense width start as the dense network, from its checkpoint."""
    moe = {'moe_stages': stages, 'expert_channels': 'dense', 'num_experts': num_experts}
    dense = randomise(build(**SMALL))
    model = build({**moe, 'top_k': min(2, num_experts)}, **SMALL)
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'))
    x = torch.randn(3, 3, 16, 16, requires_grad=True)
    dense.eval(), model.eval()
    expected, actual = dense(x)[0], model(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    (found,) = torch.autograd.grad(actual.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('stage', [0, 1, 3])
def test_patches(depth, stage, randomise):
    """Each cell of a 2×2 grid is routed by itself and sees its true neighbours."""
    small = {**SMALL, 'depth': depth}
    dense = randomise(build(**small))
    moe = {'moe_stages': stage, 'expert_channels': 'dense', 'granularity': 'patch', 'grid_size': 2}
    model = build(moe, **small)
    model.load_state_dict(dense.state_dict(), strict=False)
    dense.eval(), model.eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[0], dense(x)[0], rtol=1e-4, atol=1e-4)
    (layer,) = find_moe_layers(model).values()
    assert layer.routing.num_items == 3 * 4


@pytest.mark.parametrize(('stage', 'grid_size', 'price'), [
    (1, 2, 2.25), (1, 4, 4), (3, 2, 4), (3, 4, 16), (4, 2, 4),
])  # fmt: skip
def test_price_of_patches(stage, grid_size, price):
    """A halo of 4 pixels at stage 1; at stages 3 and 4 every patch is the whole map."""
    moe = {'moe_stages': stage, 'expert_channels': 5}
    patches = {**moe, 'granularity': 'patch', 'grid_size': grid_size}
    channels, side = {1: (8, 32), 3: (16, 16), 4: (32, 8)}[stage]
    x = torch.randn(1, channels, side, side)
    by_image, by_patch = (getattr(build(m, **SMALL), f'layer{stage}') for m in (moe, patches))
    assert count_flops(by_patch, x) == pytest.approx(price * count_flops(by_image, x), rel=0.01)


@pytest.mark.parametrize('width', ['equal_flops', 5, (3, 3, 3, 3)], ids=str)
def test_dense_checkpoint_of_another_width(width, tmp_path):
    """A part of it would fit, the last convolution: that is no start at the dense accuracy."""
    torch.save({'state_dict': build(**SMALL).state_dict()}, tmp_path / 'dense.pth')
    model = build({'moe_stages': 3, 'expert_channels': width}, **SMALL)
    with pytest.raises(ConfigError, match=r"layer3\..* does not fit .*expert_channels='dense'"):
        load_checkpoint(model, str(tmp_path / 'dense.pth'))


def test_group_norm():
    """It divides the channels, so the widths that are tried are multiples of its groups."""
    norm_cfg = {'type': 'GN', 'num_groups': 4}
    model = build({'moe_stages': (2, 4)}, **SMALL, norm_cfg=norm_cfg)
    for layer in (model.layer2, model.layer4):
        assert layer.experts[0][0].conv1.out_channels % 4 == 0
    assert model(torch.randn(2, 3, 16, 16))[0].shape == (2, 64, 2, 2)


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('stage', [0, 1, 3])
def test_mixing_by_hand(stage, residual, randomise):
    moe = {'moe_stages': stage, 'num_experts': 5, 'top_k': 2, 'residual': residual}
    model = randomise(build(moe, **SMALL))
    model.eval()
    layer = model.conv1 if stage == 0 else getattr(model, f'layer{stage}')
    x = torch.randn(6, layer.router.in_channels, 8, 8)
    actual = layer(x)
    logits = x.mean((2, 3)) @ layer.router.fc.weight.T + layer.router.fc.bias
    for i, image in enumerate(x):
        values, chosen = logits[i].topk(2)
        expected = 0
        for weight, e in zip(values.softmax(0), chosen.tolist(), strict=True):
            if stage == 0:
                y = nn.functional.conv2d(image[None], layer.experts.weight[e], padding=1)[0]
            else:
                y = layer.experts[e](image[None])[0]
            expected = expected + weight * y
        if residual:
            expected = expected + layer.shortcut(image[None])[0]
        torch.testing.assert_close(actual[i], expected, rtol=1e-4, atol=1e-4)


def test_shortcuts():
    model = build({'moe_stages': (0, 1, 2), 'residual': True}, **SMALL)
    assert isinstance(model.layer1.shortcut, nn.Identity)
    for layer, shape, stride in (
        (model.conv1, (8, 3, 1, 1), (1, 1)),
        (model.layer2, (16, 8, 1, 1), (2, 2)),
    ):
        conv, norm = layer.shortcut
        assert tuple(conv.weight.shape) == shape
        assert conv.stride == stride
        assert isinstance(norm, nn.BatchNorm2d)
    assert build({}, **SMALL).layer4.shortcut is None


def test_initial_weights():
    model = build({'moe_stages': (0, 4)}, depth=18)
    model.init_weights()
    assert isinstance(model.conv1.experts, ConvExperts)
    # Kaiming's for ReLU, by the fan out, as MMPretrain's ResNet has it for every convolution.
    for weight, fan_out in (
        (model.conv1.experts.weight, 64 * 9),
        (model.layer4.experts[2][0].conv1.weight, 195 * 9),
    ):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    first, second = model.layer4.experts[:2]
    assert not torch.equal(first[0].conv1.weight, second[0].conv1.weight)
    assert not torch.equal(*model.conv1.experts.weight[:2])
    assert all((block.bn2.weight == 0).all() for expert in model.layer4.experts for block in expert)


def test_shared_initial_weights():
    model = build({'moe_stages': (0, 4), 'expert_init': 'shared'}, **SMALL)
    model.init_weights()
    for kernel in model.conv1.experts.weight:
        assert torch.equal(kernel, model.conv1.experts.weight[0])
    first, *others = model.layer4.experts
    for other in others:
        assert torch.equal(other[1].conv2.weight, first[1].conv2.weight)


def test_frozen_stages():
    model = build({'moe_stages': (0, 1, 3)}, **SMALL, frozen_stages=2)
    frozen = {name.split('.')[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'conv1', 'bn1', 'layer1', 'layer2'}
    model.train()
    assert model.layer4.training
    assert not model.layer1.training


def test_images_in_training():
    """Experts learn together with the rest; each normalises the images that it gets."""
    model = build({'moe_stages': (2,)}, **SMALL)
    (layer,) = find_moe_layers(model).values()
    model.train()
    model(torch.randn(16, 3, 16, 16))[0].square().sum().backward()
    load = layer.routing.load()
    assert load.sum() == 32
    for used, expert in zip((load > 0).tolist(), layer.experts, strict=True):
        gradient = expert[0].conv1.weight.grad
        assert (gradient.abs().sum() > 0).item() is used
        assert expert[0].bn1.num_batches_tracked == int(used)


@pytest.mark.parametrize(('options', 'message'), [
    ({'moe_stages': 5}, r'moe_stages=5 must name some of 0 to 4'),
    ({'moe_stages': ()}, r'moe_stages=\(\) must name some'),
    ({'moe_stages': (0, 0)}, r'moe_stages=\(0, 0\) must name some of .*, each once'),
    ({'moe_stages': [4, 4]}, r'moe_stages=\[4, 4\] must name some of .*, each once'),
    ({'expert_channels': 0}, r'expert_channels=0 must be a positive integer'),
    ({'expert_channels': 25.0}, r'expert_channels=25.0 must be a positive integer'),
    ({'moe_stages': 4.0}, r'moe_stages=4.0 must name some'),
    ({'moe_stages': True}, r'moe_stages=True must name some'),
    ({'top_k': 5}, r'num_experts=4 and top_k=5 must be integers with 1 <= top_k'),
    ({'num_experts': 2.5}, r'num_experts=2.5 and top_k=2 must be integers'),
    ({'norm_cfg': {'type': 'GN', 'num_groups': 4}, 'expert_channels': 6},
     r'expert_channels=6 of stage 4 is no multiple of norm_cfg.num_groups=4'),
    ({'granularity': 'patch', 'grid_size': 2},
     r"'equal_flops' of stage 4 cannot be told with granularity='patch', .* as a number"),
    ({'moe_stages': 0, 'conv_cfg': {'type': 'ConvWS'}}, r'conv_cfg: ConvWS2d is not supported'),
    ({'expert_channels': (25, 50)}, r'expert_channels=\(25, 50\) must be .* 4 stages'),
    ({'expert_channels': 'wide'}, r"'wide' must be .* or 'equal_flops', or 'dense'"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, **SMALL)


def test_a_stage_twice_in_the_backbone_of_detectors():
    with pytest.raises(ConfigError, match=r'moe_stages=\(4, 4\) must name some of .*, each once'):
        moe_resnet(depth=18, base_channels=4, stem_channels=4, moe_stages=(4, 4))
