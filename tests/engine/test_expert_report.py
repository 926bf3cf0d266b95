"""The report at the beginning of a training."""

import random
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet_moe.engine.expert_report import ExpertReportHook
from mmdet_moe.moe import add_experts


class Classifier(nn.Module):
    """One that draws random numbers of every kind."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.conv(inputs) * torch.rand(1) * random.random() * np.random.random()  # noqa: NPY002


def log_of(model, **cfg):
    """What the hook logs."""
    runner = SimpleNamespace(
        model=model, cfg=Config(dict(default_scope='mmpretrain', **cfg)), logger=Mock()
    )
    ExpertReportHook().before_train(runner)
    return [call.args[0] for call in runner.logger.info.call_args_list]


def with_experts(channels=3):
    model = Classifier(channels)
    add_experts(model, {'conv': {}})
    return model


@pytest.mark.parametrize('channels', [1, 3])
def test_flops_of_one_image(channels):
    loader = dict(dataset=dict(pipeline=[dict(type='RandomCrop', crop_size=500)]))
    (text,) = log_of(with_experts(channels), train_dataloader=loader)
    heading, _, row, _ = text.splitlines()
    assert '500×500 pixels' in heading
    one = f'{2 * channels * 4 * 500**2 / 1e9:.2f}'
    two = f'{4 * channels * 4 * 500**2 / 1e9:.2f}'
    assert row.split()[-2:] == [one, two]


def test_random_numbers_stay_the_same():
    model = with_experts()

    def draw():
        return torch.rand(1).item(), random.random(), np.random.random()  # noqa: NPY002

    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(3)
    expected = draw()
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(3)
    assert 'GFLOPs' in log_of(model)[0]
    assert draw() == expected


def test_a_model_that_does_not_run_on_images():
    (text,) = log_of(with_experts(channels=5))
    assert text.startswith('Experts (no FLOPs: the model does not run on images of 224×224 pixels')
    assert 'Conv2d' in text
    assert 'GFLOPs' not in text


def test_a_model_that_all_ranks_run_together():
    class Sharded(nn.Module):
        module = with_experts()

    from mmengine.registry import MODEL_WRAPPERS

    with MODEL_WRAPPERS.switch_scope_and_registry(None):
        MODEL_WRAPPERS.register_module(module=Sharded, force=True)
    try:
        assert 'Sharded runs on all ranks together' in log_of(Sharded())[0]
    finally:
        del MODEL_WRAPPERS._module_dict['Sharded']


def test_silent_without_experts():
    assert log_of(Classifier()) == []


def test_silent_on_other_ranks(monkeypatch):
    monkeypatch.setattr('mmdet_moe.engine.expert_report.is_main_process', lambda: False)
    assert log_of(with_experts()) == []
