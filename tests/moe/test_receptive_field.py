"""What a NaN shows of how far a module sees, against what its kernels say."""

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops import SqueezeExcitation

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.receptive_field import receptive_field

C = 8  # torchvision rounds to multiples of it


def conv(kernel=3, **options):
    return nn.Conv2d(C, C, kernel, **{'padding': (kernel - 1) // 2, **options})


def inverted_residual(stride, squeeze=False):
    config = InvertedResidualConfig(C, 5, 8, C, squeeze, 'HS', stride, 1, 1.0)
    return InvertedResidual(config, nn.BatchNorm2d)


def silent(module):
    nn.init.zeros_(module.weight)
    return module


class Skip(nn.Module):
    """A branch that sees far beside one that does not."""

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.BatchNorm2d(C), conv(7)

    def forward(self, x):
        return self.near(x) * torch.sigmoid(self.far(x))


CASES = {  # module, radius, stride
    'inverted residual': (lambda: inverted_residual(1), 2, 1),
    'strided inverted residual': (lambda: inverted_residual(2), 2, 2),
    'gate': (Skip, 3, 1),
    'max pool and clamp': (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Hardtanh()), 1, 2),
    'average pool': (lambda: nn.AvgPool2d(2), 1, 2),
    'far': (lambda: nn.Sequential(*[conv(9) for _ in range(12)]), 48, 1),
    'stride 16': (lambda: nn.Sequential(*[conv(stride=2) for _ in range(4)]), 15, 16),
    'stride 3': (lambda: conv(stride=3), 1, 3),
    'one axis': (lambda: nn.Conv2d(C, C, (1, 5), padding=(0, 2)), 2, 1),
    'causal': (lambda: nn.Sequential(nn.ZeroPad2d((4, 0, 0, 0)), nn.Conv2d(C, C, (1, 5))), 4, 1),
    'large patches': (lambda: nn.Conv2d(C, C, 16, stride=16), 15, 16),
    'reflected': (lambda: conv(5, padding_mode='reflect'), 2, 1),
    'zero weights': (lambda: nn.Sequential(conv(), silent(conv())), 2, 1),
}


@pytest.mark.parametrize(('make', 'radius', 'stride'), CASES.values(), ids=CASES)
def test_receptive_field(make, radius, stride):
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert receptive_field(module, C) == (radius, stride)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Spin(nn.Module):
    def forward(self, x):
        return x.roll(1, dims=3)


class Blur(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


class Deaf(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    'module',
    [
        SqueezeExcitation(C, 2),
        inverted_residual(1, squeeze=True),
        nn.GroupNorm(2, C),
        nn.ConvTranspose2d(C, C, 2, stride=2),
        conv(padding_mode='circular'),
        Spin(),
        Blur(),
        nn.Sequential(conv(), Blur()),
        nn.AdaptiveAvgPool2d(1),
        ConvModule(C, 2, 3, padding=1, norm_cfg={'type': 'GN', 'num_groups': 1}),
        nn.Upsample(scale_factor=2),
        nn.Linear(C, C),
        Deaf(),
        nn.Flatten(),
        nn.Conv2d(C + 1, C, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_refusals(module):
    with pytest.raises(ConfigError, match='cannot tell the receptive field of'):
        receptive_field(module, C)
