"""Narrow twins of modules against widths worked out by hand, and against the dense modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.backbones.resnet import ResNet
from mmdet.models.backbones.resnext import ResNeXt
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.swin_transformer import SwinTransformerBlock

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts.upcycling import slice_dense
from mmdet_moe.moe.flops import count_flops
from mmdet_moe.moe.surgery.width import equal_width, narrow

C = 16


def subnet(norm_cfg=None, convs=3):
    stack = [ConvModule(C, C, 3, padding=1, norm_cfg=norm_cfg) for _ in range(convs)]
    return nn.Sequential(*stack, nn.Conv2d(C, 5, 3, padding=1))


def basic_stage():
    return ResNet(18, base_channels=8).layer2


def bottleneck_stage():
    return ResNet(50, base_channels=8).layer1


def convnext_block():
    return CNBlock(C, 1e-6, 0.0, None)


def inverted_residual():
    config = InvertedResidualConfig(C, 3, 64, C, True, 'HS', 1, 1, 1.0)
    return InvertedResidual(config, nn.BatchNorm2d)


def swin_block():
    return SwinTransformerBlock(C, 2, [2, 2], [1, 1], stochastic_depth_prob=0.1)


def resnext_stage():
    return ResNeXt(depth=50, groups=4, base_width=4, base_channels=16).layer1


def mlp():
    return nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))


def gn():
    return {'type': 'GN', 'num_groups': 4}


MAP, TOKENS = (2, C, 8, 8), (2, 9, C)
#: Module, shape of its input, and some widths of the module of half the width: by the name of a
#: parameter, its shape.
CASES = {
    'basic': (
        basic_stage,
        (2, 8, 8, 8),
        {'0.conv1.weight': (8, 8, 3, 3), '0.conv2.weight': (16, 8, 3, 3), '0.bn1.bias': (8,)},
    ),
    'bottleneck': (
        bottleneck_stage,
        (2, 8, 8, 8),
        {'1.conv1.weight': (4, 32, 1, 1), '1.conv2.weight': (4, 4, 3, 3), '1.bn3.weight': (32,)},
    ),
    'grouped': (
        resnext_stage,
        MAP,
        {'1.conv1.weight': (8, 64, 1, 1), '1.conv2.weight': (8, 2, 3, 3), '1.bn2.bias': (8,)},
    ),
    'subnet': (
        subnet,
        MAP,
        {'0.conv.weight': (8, C, 3, 3), '1.conv.weight': (8, 8, 3, 3), '3.weight': (5, 8, 3, 3)},
    ),
    'subnet of BN': (
        lambda: subnet({'type': 'BN'}),
        MAP,
        {'1.bn.running_var': (8,), '2.conv.weight': (8, 8, 3, 3)},
    ),
    'subnet of GN': (lambda: subnet(gn()), MAP, {'1.gn.weight': (8,), '3.weight': (5, 8, 3, 3)}),
    'mlp': (mlp, TOKENS, {'0.weight': (32, C), '0.bias': (32,), '2.weight': (C, 32)}),
    'ffn': (lambda: FFN(C, 64), TOKENS, {'layers.0.0.weight': (32, C), 'layers.1.bias': (C,)}),
    'convnext': (
        convnext_block,
        MAP,
        {'block.0.weight': (C, 1, 7, 7), 'block.3.weight': (32, C), 'layer_scale': (C, 1, 1)},
    ),
    'depthwise': (
        inverted_residual,
        MAP,
        {'block.0.0.weight': (32, C, 1, 1), 'block.1.0.weight': (32, 1, 3, 3)},
    ),
    'swin': (
        swin_block,
        (2, 4, 4, C),
        {'mlp.0.weight': (32, C), 'attn.qkv.weight': (3 * C, C), 'norm2.weight': (C,)},
    ),
    'transformer': (
        lambda: nn.TransformerEncoderLayer(C, 4, 64, batch_first=True),
        TOKENS,
        {'linear1.weight': (32, C), 'self_attn.in_proj_weight': (3 * C, C)},
    ),
}


def every_case(test):
    return pytest.mark.sweep(keep=1 / 2)(
        pytest.mark.parametrize(('make', 'shape', 'widths'), CASES.values(), ids=CASES)(test)
    )


@every_case
def test_narrow(make, shape, widths):
    module, x = make(), torch.randn(shape)
    before = copy.deepcopy(module.state_dict())
    twin = narrow(module, x, 0.5)
    state = twin.state_dict()
    assert {name: tuple(state[name].shape) for name in widths} == widths
    assert state.keys() == before.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    y = twin(x)
    assert y.shape == module(x).shape
    y.square().mean().backward()
    assert all(p.grad is not None for p in twin.parameters())


@every_case
def test_layers_say_how_wide_they_are(make, shape, widths):
    """A layer built from the numbers that the narrow one names takes its weights."""
    numbers = {
        nn.Conv2d: ('in_channels', 'out_channels', 'kernel_size', 'groups'),
        nn.Linear: ('in_features', 'out_features'),
        nn.BatchNorm2d: ('num_features',),
        nn.GroupNorm: ('num_groups', 'num_channels'),
        nn.LayerNorm: ('normalized_shape',),
    }
    for layer in narrow(make(), torch.randn(shape), 0.5).modules():
        if names := numbers.get(type(layer)):
            rebuilt = type(layer)(**{name: getattr(layer, name) for name in names})
            for name, parameter in layer.named_parameters():
                assert rebuilt.get_parameter(name).shape == parameter.shape
        if isinstance(layer, ConvModule):
            assert layer.out_channels == layer.conv.out_channels


@every_case
def test_equal_width(make, shape, widths):
    module, x = make(), torch.randn(shape)
    factor = equal_width(module, x, 2)
    dense = count_flops(module, x)
    cost = 2 * count_flops(narrow(module, x, factor), x) / dense
    # No other width comes closer.
    others = [2 * count_flops(narrow(module, x, i / 8), x) / dense for i in range(1, 8)]
    assert abs(cost - 1) <= min(abs(other - 1) for other in others) + 1e-9
    assert cost == pytest.approx(1, abs=0.45)  # group norm and grouped convolutions take big steps


def test_shared_experts_count():
    x = torch.randn(TOKENS)
    assert equal_width(mlp(), x, 2) == 0.5
    assert equal_width(mlp(), x, 2, shared=2) == 0.25
    assert equal_width(mlp(), x, 1) == 1


def test_what_is_too_dear_even_narrow():
    stage = nn.Sequential(nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(8, 64, 3, padding=1))
    with pytest.raises(ConfigError, match=r"width='equal': top_k=8 and 3 shared .* 1\.38 times"):
        equal_width(stage, torch.randn(1, 64, 8, 8), 8, shared=3)
    factor = equal_width(stage, torch.randn(1, 64, 8, 8), 8, shared=3, tolerance=0.4)
    assert factor == 1 / 8


class Calibrated(nn.Module):
    """Means over everything, of its input as of its hidden layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(C, 32), nn.Linear(32, C)

    def forward(self, x):
        h = self.up(x)
        return self.down(h / h.abs().mean()) + x.sum()


def test_reductions_of_all_axes():
    twin = narrow(Calibrated(), torch.zeros(TOKENS), 0.5)
    assert twin.up.weight.shape == (16, C)
    assert twin(torch.randn(TOKENS)).shape == TOKENS


@pytest.mark.parametrize('factor', [0.01, 0.1, 0.3, 0.77])
def test_widths_fit_groups(factor):
    """Group norm and grouped convolutions divide what is left; at least a channel per group."""
    twin = narrow(subnet(gn()), torch.randn(MAP), factor)
    width = twin[0].conv.out_channels
    assert width == max(4, 4 * round(C / 4 * factor))
    conv = narrow(resnext_stage(), torch.randn(MAP), factor)[1].conv2
    assert conv.out_channels == max(4, 4 * round(factor * 4))
    assert conv.groups == 4


def test_weights_are_drawn_anew():
    """As a layer of that width draws them: with its own fan-in, independent of the dense ones."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    twin = narrow(module, torch.randn(1, 64), 0.25)
    assert twin[2].weight.std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.05)
    both = torch.stack([twin[0].weight.flatten(), module[0].weight[:1024].flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.02


def test_frozen_parameters_and_modes_stay():
    module = mlp().eval().double()
    module[0].bias.requires_grad_(False)
    twin = narrow(module, torch.randn(TOKENS), 0.5)
    assert not twin[0].bias.requires_grad
    assert twin[0].weight.requires_grad
    assert not twin.training
    assert twin[0].weight.dtype == torch.float64


def test_shared_parameters_stay_shared():
    module = nn.Sequential(*[nn.Conv2d(C, C, 1) for _ in range(4)])
    module[2].weight = module[1].weight
    twin = narrow(module, torch.randn(MAP), 0.5)
    assert twin[2].weight is twin[1].weight
    assert twin[1].weight.shape == (8, 8, 1, 1)


class Shuffle(nn.Module):
    """Its second half of channels first, with numbers in the code."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        x = self.before(x)
        return self.after(x[:, : C // 2].repeat(1, 2, 1, 1))


class Hard(nn.Module):
    """Code that knows a width."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        return self.b(F.layer_norm(self.a(x), (C,)))


@pytest.mark.parametrize(
    ('module', 'shape', 'message'),
    [
        (nn.Conv2d(C, C, 3), MAP, 'nothing inside Conv2d can be narrower'),
        (nn.Linear(C, C), TOKENS, 'nothing inside Linear can be narrower'),
        (Shuffle(), MAP, "that 'before' makes in Shuffle go through .* 'slice'"),
        (Hard(), TOKENS, "that 'a' makes in Hard go through .* 'native_layer_norm'"),
        (nn.Sequential(nn.Conv2d(3, C, 1)), MAP, 'does not run on shapes alone'),
    ],
)
def test_refusals(module, shape, message):
    for call in (lambda x: narrow(module, x, 0.5), lambda x: equal_width(module, x, 2)):
        with pytest.raises(ConfigError, match=message):
            call(torch.randn(shape))


@pytest.mark.parametrize('factor', [0, -1, 1.5, 'half', None, True])
def test_bad_factors(factor):
    with pytest.raises(ConfigError, match='experts: width='):
        narrow(mlp(), torch.randn(TOKENS), factor)


def load_slices(twin, dense, expert, num_experts):
    entries = dense.state_dict()
    state = {
        name: slice_dense(entries[name], value.shape, expert, num_experts)
        for name, value in twin.state_dict().items()
    }
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize('num_experts', [2, 4, 8])
def test_slices_of_one_hidden_layer_sum_up(num_experts):
    """Where every hidden channel is in equally many experts, their mean is the dense output."""
    module, x = mlp().double(), torch.randn(TOKENS, dtype=torch.float64)
    nn.init.zeros_(module[2].bias)
    twins = [
        load_slices(narrow(module, x, 0.5), module, e, num_experts) for e in range(num_experts)
    ]
    mean = sum(twin(x) for twin in twins) / num_experts
    torch.testing.assert_close(mean, module(x))
    assert not torch.allclose(twins[0](x), twins[1](x))


def trained_net():
    """Convolutions that have learned something: to blur, by 150 steps."""
    net = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 2, 3, padding=1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        x = torch.randn(16, 2, 8, 8)
        loss = F.mse_loss(net(x), F.avg_pool2d(x, 3, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def test_slices_are_a_better_start_than_fresh_weights():
    net, x = trained_net(), torch.randn(64, 2, 8, 8)
    with torch.no_grad():
        expected = net(x)

        def error(twins):
            mean = sum(twin.eval()(x) for twin in twins) / len(twins)
            return F.mse_loss(mean, expected).item() / expected.square().mean().item()

        sliced = error([load_slices(narrow(net, x, 0.5), net, e, 4) for e in range(4)])
        fresh = error([narrow(net, x, 0.5) for _ in range(4)])
        alone = error([load_slices(narrow(net, x, 0.5), net, 0, 4)])
    assert sliced < 0.5 * fresh
    assert sliced < alone  # only together do they stand for all channels


def test_equal_shapes_are_taken_as_they_are():
    net, x = trained_net(), torch.randn(4, 2, 8, 8)
    twin = load_slices(copy.deepcopy(net), net, 3, 4)
    assert torch.equal(twin(x), net(x))
    entry = torch.randn(4, 4)
    assert slice_dense(entry, entry.shape, 1, 2) is entry


def test_the_channels_of_an_expert():
    entry = torch.arange(8.0)
    assert slice_dense(entry, torch.Size([4]), 3, 4).tolist() == [6, 7, 0, 1]
    weight = torch.arange(16.0).view(2, 8)
    assert slice_dense(weight, torch.Size([1, 2]), 1, 2).tolist() == [[(8 + 4) * 4, (8 + 5) * 4]]


@pytest.mark.parametrize('shape', [(9,), (4, 1), ()])
def test_slices_of_other_kinds(shape):
    with pytest.raises(ConfigError, match='cannot be cut out of a dense one of shape'):
        slice_dense(torch.zeros(8), torch.Size(shape), 0, 2)
