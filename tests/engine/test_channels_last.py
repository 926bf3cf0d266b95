"""Maps pixel by pixel in memory, and by which options."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_moe import cli
from mmdet_moe.engine.channels_last import ChannelsLastHook, check_float32
from mmdet_moe.errors import ConfigError


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_group_normalisation(dtype):
    """In bfloat16 it sees its maps channel by channel; results and gradients are the same."""
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(2, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.func.functional_call(norm, dict(norm.named_parameters()), x)
    expected.sum().square().backward()
    gradient, x.grad = x.grad, None
    ChannelsLastHook().before_train(SimpleNamespace(model=nn.Sequential(norm)))
    seen = []
    norm.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0].is_contiguous()))
    y = norm(x)
    y.sum().square().backward()
    assert seen == [dtype == torch.bfloat16]
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(x.grad, gradient, atol=2e-2, rtol=2e-2)


def test_other_dimensions_stay():
    """Mixed precision on a CPU asks every model for the format, those with 3D convolutions too."""
    kernels = {'2d': nn.Conv2d(3, 4, 3).weight, '3d': nn.Conv3d(3, 4, 3).weight}
    model = nn.ParameterDict(kernels)
    ChannelsLastHook().before_train(SimpleNamespace(model=model))
    assert model['2d'] is kernels['2d']
    assert model['2d'].is_contiguous(memory_format=torch.channels_last)
    assert model['3d'].is_contiguous()


@pytest.mark.parametrize('kind', ['AmpOptimWrapper', 'CpuAmpOptimWrapper', 'OptimWrapper'])
@pytest.mark.parametrize('amp', [True, False])
@pytest.mark.parametrize('asked', [True, False])
@pytest.mark.parametrize('has_bfloat16', [True, False])
def test_options(kind, amp, asked, has_bfloat16, tmp_path, monkeypatch):
    """Mixed precision on a CPU that has it brings the memory format along."""
    monkeypatch.setattr('mmdet_moe.compat.amp.has_bfloat16', lambda: has_bfloat16)
    options = ['--amp'] * amp + ['--channels-last'] * asked
    options += ['--cfg-options', f'optim_wrapper.type={kind}']
    expected = asked or (has_bfloat16 and (amp or kind != 'OptimWrapper'))
    path = tmp_path / 'config.py'
    path.write_text("default_scope = 'mmpretrain'\noptim_wrapper = dict(optimizer=dict(lr=1))\n")
    hooks = []
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(cli, '_check', lambda *args: None)
    runner = SimpleNamespace(register_hook=hooks.append, model=nn.Conv2d(3, 3, 1))
    monkeypatch.setattr(cli, '_build_runner', lambda cfg: runner)
    cli._prepare_training(cli._parse_train([str(path), '--work-dir', str(tmp_path), *options]))
    assert any(isinstance(hook, ChannelsLastHook) for hook in hooks) == expected


@pytest.mark.parametrize(('conv', 'is_refused'), [
    (nn.Conv2d(7, 32, 1, stride=2), True), (nn.Conv2d(16, 32, 1, stride=2, groups=4), True),
    (nn.Conv2d(8, 8, 1, stride=2), False), (nn.Conv2d(4, 8, 1), False),
    (nn.Conv2d(4, 8, 3, stride=2), False), (nn.Linear(8, 8), False),
])  # fmt: skip
def test_wrong_gradients_in_float32(conv, is_refused):
    """By the conditions of the kernel's defect."""
    model = nn.Sequential(nn.Identity(), conv)
    if is_refused:
        with pytest.raises(ConfigError, match=r'^--channels-last: 1 is a 1×1 convolution with'):
            check_float32(model)
    else:
        check_float32(model)
