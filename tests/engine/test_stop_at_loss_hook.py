"""The last iteration is the one that the losses ask for, with its checkpoint and validation."""

import json

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmdet_moe.engine import StopAtLossHook
from mmdet_moe.errors import ConfigError


class Scripted(BaseModel):
    """Its loss in every iteration is written down beforehand."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = list(losses)

    def forward(self, inputs, targets, mode='tensor'):
        if mode == 'loss':
            return {'loss_a': 0 * self.weight + self.losses.pop(0), 'loss_b': torch.tensor(100.0)}
        return [self.weight for _ in inputs]


@pytest.mark.parametrize(
    ('options', 'losses', 'last'),
    [
        ({'threshold': 0.5, 'key': 'loss_a'}, [3, 2, 0.5, 1, 0.1, 1], 3),
        ({'threshold': 0.5, 'key': 'loss_a', 'begin': 3}, [3, 2, 0.5, 1, 0.1, 1], 5),
        ({'threshold': 100.5}, [3, 2, 0.5, 1, 0.1, 1], 3),
        ({'rise': 1.0, 'key': 'loss_a'}, [3, 2, 2.9, 1, 1.9, 2.1], 6),
        ({'rise': 0.5, 'key': 'loss_a'}, [3, 2, 2.4, 1, 1.6, 1], 5),
        ({'rise': 0.5, 'key': 'loss_a', 'begin': 1}, [1, 3, 0, 0, 0, 0], 2),
        ({'threshold': 0.5, 'rise': 9.0, 'key': 'loss_a'}, [3, 2, 1, 1, 1, 1], 6),
    ],
)
def test_last_iteration(options, losses, last, make_runner):
    hook = {'type': 'mmdet_moe.StopAtLossHook', **options}
    runner = make_runner(Scripted(losses), [hook], max_iters=6, val_interval=6)
    runner.train()
    assert runner.iter == last
    work_dir = runner.work_dir
    with open(f'{work_dir}/last_checkpoint') as file:
        assert file.read().endswith(f'iter_{last}.pth')
    with open(f'{runner.log_dir}/vis_data/scalars.json') as file:
        lines = [json.loads(line) for line in file]
    assert len([line for line in lines if 'sum' in line]) == 1  # the validation


def test_refused(make_runner):
    with pytest.raises(ConfigError, match='give threshold, rise or both'):
        StopAtLossHook()
    hook = {'type': 'mmdet_moe.StopAtLossHook', 'threshold': 1.0, 'key': 'loss_c'}
    runner = make_runner(Scripted([1.0]), [hook], max_iters=1)
    with pytest.raises(ConfigError, match=r"key='loss_c' is none of the losses \['loss', 'loss_a'"):
        runner.train()
    runner = make_runner(Scripted([1.0]), [{**hook, 'key': 'loss'}], max_iters=1, name='epochs')
    runner._train_loop = {'type': 'EpochBasedTrainLoop', 'max_epochs': 1}
    with pytest.raises(ConfigError, match='IterBasedTrainLoop'):
        runner.train()
