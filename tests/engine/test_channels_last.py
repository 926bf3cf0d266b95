"""Maps pixel by pixel in memory, and by which options."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_moe import cli
from mmdet_moe.engine.channels_last import ChannelsLastHook


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


@pytest.mark.parametrize(('options', 'expected'), [
    ([], False), (['--channels-last'], True), (['--amp'], True),
    (['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper'], True),
])  # fmt: skip
def test_options(options, expected, tmp_path, monkeypatch):
    """Mixed precision on a CPU brings the memory format along."""
    path = tmp_path / 'config.py'
    path.write_text("default_scope = 'mmpretrain'\noptim_wrapper = dict(optimizer=dict(lr=1))\n")
    hooks = []
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(cli, '_check', lambda *args: None)
    runner = SimpleNamespace(register_hook=hooks.append)
    monkeypatch.setattr(cli, '_build_runner', lambda cfg: runner)
    cli._prepare_training(cli._parse_train([str(path), '--work-dir', str(tmp_path), *options]))
    assert any(isinstance(hook, ChannelsLastHook) for hook in hooks) == expected
