"""A resumed training has the rates of its config, as if it had been trained so from the start."""

import math

import pytest
from toy_runs import ToyData

from mmdet_moe.engine.resumed_schedule import ResumedScheduleHook


def cosine(end):
    return [dict(type='CosineAnnealingLR', T_max=end, by_epoch=False, end=end)]


def milestones(*at):
    warmup = dict(type='LinearLR', start_factor=0.1, begin=0, end=2, by_epoch=False)
    return [warmup, dict(type='MultiStepLR', milestones=at, by_epoch=False, end=99)]


class Rates(ResumedScheduleHook):
    """Remembers the rate of each iteration."""

    def __init__(self):
        self.rates, self.settings = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])
        group = runner.optim_wrapper.param_groups[0]
        self.settings.append((group['momentum'], group['weight_decay']))


@pytest.fixture
def train(make_runner, toy_model):
    def run(iters, schedule, lr=0.01, resume=None, settings=(), **options):
        name = f'run{iters}{len(str(schedule))}{lr}{resume is None}'
        if resume is not None:
            options |= dict(resume=True, load_from=str(resume))
        runner = make_runner(
            toy_model(),
            [hook := Rates()],
            max_iters=iters,
            name=name,
            param_scheduler=schedule,
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr, momentum=0.9) | dict(settings)),
            **options,
        )
        runner.train()
        run.settings = hook.settings
        return hook.rates, f'{runner.work_dir}/iter_{iters}.pth'

    return run


def test_a_longer_cosine(train, capsys):
    _, checkpoint = train(4, cosine(4))
    rates, _ = train(8, cosine(8), resume=checkpoint)
    assert rates == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(4, 8)], rel=1e-6
    )
    note = "the config's are taken, at iteration 4 0.005 instead of "
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ('schedule', 'changed', 'lr', 'expected'),
    [
        (milestones(3), milestones(5), 0.01, [0.01, 0.001]),
        (milestones(3), milestones(3), 0.02, [0.002, 0.002]),
        (None, milestones(5), 0.01, [0.01, 0.001]),
        (milestones(3), None, 0.01, [0.01, 0.01]),
    ],
)
def test_other_changes(train, schedule, changed, lr, expected):
    _, checkpoint = train(4, schedule)
    rates, _ = train(6, changed, lr, resume=checkpoint)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize('schedule', [None, cosine(8), milestones(3)])
def test_the_same_settings_are_left_alone(train, schedule, capsys):
    whole, _ = train(8, schedule)
    _, checkpoint = train(4, schedule)
    rates, _ = train(8, schedule, resume=checkpoint)
    assert rates == whole[4:]  # bit for bit
    assert 'note: --resume' not in capsys.readouterr().out


def test_the_default_end_of_a_schedule_is_that_of_the_training(train):
    """MMEngine's: in the checkpoint of four iterations it is the fourth."""
    (schedule,) = milestones(6)[1:]
    del schedule['end']
    _, checkpoint = train(4, [schedule])
    rates, _ = train(8, [schedule], resume=checkpoint)
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_epochs(make_runner, toy_model):
    """Of four iterations each, with a scheduler by epochs and one by iterations."""

    def train(epochs, **options):
        schedule = [*milestones(9)[:1], dict(type='CosineAnnealingLR', T_max=epochs, end=epochs)]
        runner = make_runner(
            toy_model(),
            [hook := Rates()],
            name=f'run{epochs}{len(options)}',
            param_scheduler=schedule,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            train_dataloader=dict(
                dataset=ToyData(),
                sampler=dict(type='DefaultSampler', shuffle=False),
                batch_size=4,
                collate_fn=dict(type='default_collate'),
            ),
            **options,
        )
        runner.train()
        return hook.rates, f'{runner.work_dir}/epoch_{epochs}.pth'

    _, checkpoint = train(2)
    whole, _ = train(4)
    resumed, _ = train(4, resume=True, load_from=checkpoint)
    assert resumed == whole[8:]


@pytest.mark.parametrize('schedule', [None, milestones(3)])
def test_settings_that_no_schedule_changes(train, schedule, capsys):
    _, checkpoint = train(4, schedule)
    train(6, schedule, resume=checkpoint, settings=dict(momentum=0.5, weight_decay=0.1))
    assert train.settings == [(0.5, 0.1)] * 2
    note = "the config's settings of the optimizer: momentum=0.5 instead of 0.9, weight_decay=0.1"
    printed = capsys.readouterr().out
    assert note in printed
    assert 'learning rate' not in printed


def test_a_momentum_that_a_schedule_changes(train, capsys):
    schedule = [dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, end=8)]
    train(8, schedule)
    whole = train.settings
    _, checkpoint = train(4, schedule)
    train(8, schedule, resume=checkpoint)
    assert train.settings == whole[4:]
    assert 'note: --resume' not in capsys.readouterr().out


def test_a_rate_without_a_schedule(train, capsys):
    _, checkpoint = train(4, None)
    rates, _ = train(6, None, 0.02, resume=checkpoint)
    assert rates == [0.01, 0.01]
    assert 'the learning rate of the checkpoint, 0.01, goes on' in capsys.readouterr().out
