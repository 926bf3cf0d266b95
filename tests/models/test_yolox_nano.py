"""The weights of YOLOX-nano's authors in MMDetection's model, against a network of their names."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.yolox_nano import FILE_NAME, convert_yolox_nano, prepare_yolox_nano


class Base(nn.Module):
    def __init__(self, c_in, c_out, kernel=1, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, 1, groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class Separable(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.dconv, self.pconv = Base(c_in, c_in, 3, stride, c_in), Base(c_in, c_out)

    def forward(self, x):
        return self.pconv(self.dconv(x))


class Bottleneck(nn.Module):
    def __init__(self, channels, add):
        super().__init__()
        self.conv1, self.conv2 = Base(channels, channels), Separable(channels, channels)
        self.add = add

    def forward(self, x):
        return self.conv2(self.conv1(x)) + (x if self.add else 0)


class Csp(nn.Module):
    def __init__(self, c_in, c_out, repeats=1, add=False):
        super().__init__()
        half = c_out // 2
        self.conv1, self.conv2, self.conv3 = Base(c_in, half), Base(c_in, half), Base(c_out, c_out)
        self.m = nn.Sequential(*(Bottleneck(half, add) for _ in range(repeats)))

    def forward(self, x):
        return self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], 1))


class Pooling(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = Base(channels, channels // 2), Base(channels * 2, channels)

    def forward(self, x):
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], 1))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Base(12, 16, 3)

    def forward(self, x):
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Stem()
        self.dark2 = nn.Sequential(Separable(16, 32, 2), Csp(32, 32, 1, True))
        self.dark3 = nn.Sequential(Separable(32, 64, 2), Csp(64, 64, 3, True))
        self.dark4 = nn.Sequential(Separable(64, 128, 2), Csp(128, 128, 3, True))
        self.dark5 = nn.Sequential(Separable(128, 256, 2), Pooling(256), Csp(256, 256))


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.lateral_conv0, self.C3_p4 = Base(256, 128), Csp(256, 128)
        self.reduce_conv1, self.C3_p3 = Base(128, 64), Csp(128, 64)
        self.bu_conv2, self.C3_n3 = Separable(64, 64, 2), Csp(128, 128)
        self.bu_conv1, self.C3_n4 = Separable(128, 128, 2), Csp(256, 256)

    def forward(self, x):
        trunk = self.backbone
        fine = trunk.dark3(trunk.dark2(trunk.stem(x)))
        middle = trunk.dark4(fine)
        coarse = self.lateral_conv0(trunk.dark5(middle))
        middle = self.C3_p4(torch.cat([F.interpolate(coarse, scale_factor=2), middle], 1))
        middle = self.reduce_conv1(middle)
        fine = self.C3_p3(torch.cat([F.interpolate(middle, scale_factor=2), fine], 1))
        middle = self.C3_n3(torch.cat([self.bu_conv2(fine), middle], 1))
        return fine, middle, self.C3_n4(torch.cat([self.bu_conv1(middle), coarse], 1))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList(Base(channels, 64) for channels in (64, 128, 256))
        for of in ('cls', 'reg'):
            convs = (nn.Sequential(Separable(64, 64), Separable(64, 64)) for _ in range(3))
            setattr(self, f'{of}_convs', nn.ModuleList(convs))
        for of, channels in (('cls', 80), ('reg', 4), ('obj', 1)):
            preds = (nn.Conv2d(64, channels, 1) for _ in range(3))
            setattr(self, f'{of}_preds', nn.ModuleList(preds))


class Published(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Neck(), Head()

    def forward(self, x):
        head = self.head
        cls, reg, obj = [], [], []
        for i, level in enumerate(self.backbone(x)):
            level = head.stems[i](level)
            of_cls, of_reg = head.cls_convs[i](level), head.reg_convs[i](level)
            cls.append(head.cls_preds[i](of_cls))
            reg.append(head.reg_preds[i](of_reg))
            obj.append(head.obj_preds[i](of_reg))
        return cls, reg, obj


@pytest.fixture(scope='module')
def published():
    torch.manual_seed(0)
    model = Published().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training
            module.running_mean.normal_()
            module.bias.data.normal_()
            for scale in (module.running_var, module.weight.data):
                scale.uniform_(0.5, 2)
    return model


@pytest.fixture
def model():
    cfg = Config.fromfile(CONFIGS / 'yolox_nano_dense_coco_subset.py')
    init_default_scope('mmdet')
    return MODELS.build(cfg.model).eval()


@torch.no_grad()
def test_outputs_are_those_of_the_published_network(published, model, tmp_path):
    torch.save({'model': published.state_dict(), 'start_epoch': 3}, tmp_path / 'theirs.pth')
    file = prepare_yolox_nano(tmp_path / 'out', tmp_path / 'theirs.pth')
    assert file == tmp_path / 'out' / FILE_NAME
    model.load_state_dict(torch.load(file))
    images = torch.randn(2, 3, 64, 96)
    outputs, expected = model(images, mode='tensor'), published(images)
    for ours, theirs in zip(outputs, expected, strict=True):
        for level, of_theirs in zip(ours, theirs, strict=True):
            torch.testing.assert_close(level, of_theirs, rtol=1e-4, atol=1e-4)
    # There is nothing left that would depend on the rest of the batch.
    assert not any('running_mean' in key for key in model.state_dict())


def test_other_weights_are_refused(published, tmp_path):
    weights = published.state_dict()
    weights['head.cls_preds.0.weight'] = torch.zeros(20, 64, 1, 1)
    message = r'multi_level_conv_cls.0.weight should be of shape \(80, 64, 1, 1\) and is \(20, 64'
    with pytest.raises(ConfigError, match=message):
        convert_yolox_nano(weights)
    (tmp_path / 'text.pth').write_text('text')
    with pytest.raises(ConfigError, match='is damaged, or no checkpoint'):
        prepare_yolox_nano(tmp_path, tmp_path / 'text.pth')
