"""The last iteration is the one that the losses ask for, with its checkpoint and validation."""

from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from running import logged
from torch import nn

from mmdet_moe import cli
from mmdet_moe.errors import ConfigError
from projects.cluster_theory import StopAtLossHook
from projects.cluster_theory.experiment import CONFIGS


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
    assert sum('sum' in line for line in logged(runner.log_dir)) == 1  # the validation


CONFIG = str(CONFIGS / 'mixture.py')
SMALL = (
    'train_dataloader.batch_size=200',
    'train_dataloader.dataset.num_samples=200',
    'val_dataloader.dataset.num_samples=50',
    'custom_hooks.1.threshold=0.69',
    'train_cfg.max_iters=60',
)


def test_a_stopped_run_that_is_resumed_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(name, *more, options=()):
        options = [*SMALL, f'experiment_name={name}', *options]
        cli.run_train([CONFIG, '--work-dir', 'run', *more, '--cfg-options', *options])

    def checkpoints():
        return {path.name: path.stat().st_mtime_ns for path in Path('run').glob('*.pth')}

    train('first')
    before = checkpoints()
    assert len(before) == 1
    assert 'iter_60.pth' not in before
    train('second', '--resume')
    assert checkpoints() == before
    validations = [line for line in logged('run') if 'accuracy/top1' in line]
    assert len(validations) == 2
    assert validations[0]['accuracy/top1'] == validations[1]['accuracy/top1']
    # Unless the options have changed what to stop at.
    train('fourth', '--resume', options=['custom_hooks.1.threshold=0.5'])
    assert set(checkpoints()) == {*before, 'iter_60.pth'}


def resumed(make_runner, hook, first, second, max_iters=8):
    """The iterations of a run that is interrupted after the losses of the first part."""
    hook = {'type': 'mmdet_moe.StopAtLossHook', 'key': 'loss_a', **hook}
    make_runner(Scripted(first), [hook], max_iters=len(first)).train()
    runner = make_runner(Scripted(second), [hook], max_iters=max_iters, resume=True)
    runner.train()
    return runner.iter


def test_an_interrupted_run_keeps_its_smallest_loss(make_runner):
    # Of the second part alone, 2.1 would be no rise by more than 1.
    assert resumed(make_runner, {'rise': 1.0}, [3, 1], [1.5, 1.2, 2.1, 1, 1, 1]) == 5


def test_an_interrupted_run_that_had_not_stopped(make_runner):
    assert resumed(make_runner, {'rise': 1.0, 'begin': 4}, [1, 3], [3, 1.5, 2.1, 9]) == 5


def test_values_older_than_the_checkpoint(make_runner):
    hook = {'type': 'mmdet_moe.StopAtLossHook', 'key': 'loss_a', 'threshold': 1.0}
    make_runner(Scripted([3, 1]), [hook], max_iters=2).train()
    make_runner(Scripted([3, 3]), [], max_iters=4, resume=True).train()
    runner = make_runner(Scripted([3, 1, 3]), [hook], max_iters=8, resume=True)
    runner.train()
    assert runner.iter == 6


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'threshold': 'abc'}, "threshold='abc' must be a finite number"),
        ({'threshold': float('nan')}, 'threshold=nan must be a finite number'),
        ({'rise': -1}, 'rise=-1 must be a finite number of at least 0'),
        ({'rise': 1, 'begin': 'x'}, "begin='x' must be an integer of at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=f'StopAtLossHook: {message}'):
        StopAtLossHook(**options)


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
