"""What the hook writes and shouts, in a Runner with a toy model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_moe_layers

BALANCING = {
    'type': 'mmdet_moe.BalancingLossHook',
    'loss': {'type': 'mmdet_moe.ImportanceLoss', 'weight': 0.5},
}
RELATIVE = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.1}}
FROZEN = {'optimizer': {'type': 'SGD', 'lr': 0.0}}


def hook(**options):
    return {'type': 'mmdet_moe.ExpertUtilizationHook', 'interval': 2, 'warmup_iters': 0, **options}


def log_of(runner):
    (path,) = Path(runner.log_dir).glob('*.log')
    return path.read_text()


def scalars_of(runner):
    path = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(line) for line in path.read_text().splitlines()]


def steer(model, bias, name='stem'):
    """A router that ignores its input."""
    router = find_moe_layers(model)[name].router
    nn.init.zeros_(router.fc.weight)
    router.fc.bias.data = torch.tensor(bias)
    return model


class LoadCounter(Hook):
    """Counts the items of each expert of the stem, batch by batch."""

    def __init__(self):
        self.loads = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        ids = runner.model.stem.routing.expert_ids.flatten().tolist()
        self.loads.append([ids.count(e) for e in range(4)])


def test_scalars(make_runner, toy_model):
    counter = LoadCounter()
    runner = make_runner(toy_model(), [hook(), BALANCING, counter])
    runner.train()
    entries = [e for e in scalars_of(runner) if 'train/moe/stem/load_0' in e]
    assert [e['step'] for e in entries] == [2, 4]
    for i, entry in enumerate(entries):
        both = [a + b for a, b in zip(*counter.loads[2 * i : 2 * i + 2], strict=True)]
        loads = [entry[f'train/moe/stem/load_{e}'] for e in range(4)]
        assert loads == pytest.approx([x / 16 for x in both])  # 2 batches of 4 images, k = 2
    names = {key for entry in scalars_of(runner) for key in entry}
    for statistic in ('importance_3', 'load_cv2', 'usage_entropy', 'decision_entropy', 'mi_input'):
        assert f'train/moe/body.moe/{statistic}' in names
    assert 'MoE (train) stem: load ' in log_of(runner)


def test_report_of_validation_and_test(make_runner, toy_model):
    model = steer(toy_model(), [1.0, 0.0, 1.0, 0.0])
    runner = make_runner(model, [hook(), BALANCING], val_interval=2, optim_wrapper=FROZEN)
    runner.train()
    report = json.loads((Path(runner.work_dir) / 'expert_utilization_val.json').read_text())
    assert report['mode'] == 'val'
    assert report['iteration'] == 4
    assert set(report['layers']) == {'stem', 'body.moe'}
    stem = report['layers']['stem']
    assert stem['num_items'] == 16  # the last validation alone
    assert stem['load'] == [0.5, 0, 0.5, 0]
    assert stem['mi_input'] == pytest.approx(0, abs=1e-6)
    assert any('val/moe/stem/load_0' in entry for entry in scalars_of(runner))

    runner = make_runner(model, [hook()], name='test')
    runner.test()
    report = json.loads((Path(runner.work_dir) / 'expert_utilization_test.json').read_text())
    assert report['mode'] == 'test'
    assert report['layers']['stem']['load'] == [0.5, 0, 0.5, 0]


def test_dead_and_collapsed(make_runner, toy_model):
    model = steer(toy_model(), [5.0, 5.0, -5.0, -5.0])
    runner = make_runner(model, [hook(), BALANCING], optim_wrapper=FROZEN)
    runner.train()
    log = log_of(runner)
    assert 'DEAD EXPERTS in stem: [2, 3] of 4' in log
    assert 'COLLAPSED ROUTING in stem' in log
    assert 'load [0.5, 0.5, 0.0, 0.0]' in log
    assert 'COLLAPSED ROUTING in body.moe' not in log
    assert 'NO BALANCING' not in log


def test_healthy_routing_is_silent(make_runner, toy_model):
    """Three groups of images, three experts in turn; every pair of experts gets some."""
    model = toy_model()
    for layer in find_moe_layers(model).values():
        # Of its channel's expert each image is sure; the second choice is expert 3.
        layer.router.fc.weight.data = torch.cat([torch.eye(3) * 4, torch.zeros(1, 3)])
        layer.router.fc.bias.data = torch.tensor([0.0, 0.0, 0.0, 1.5])
    for layer in model.stem.experts:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    runner = make_runner(model, [hook(), BALANCING], optim_wrapper=FROZEN)
    runner.train()
    entry = next(e for e in scalars_of(runner) if 'train/moe/stem/mi_input' in e)
    assert entry['train/moe/stem/mi_input'] > 0.5 * math.log(3)
    assert not [w for w in ('DEAD', 'COLLAPSED', 'NO BALANCING') if w in log_of(runner)]


def test_every_collapsed_layer_is_named(make_runner, toy_model):
    """MMEngine's logger drops warnings that it takes for repetitions."""
    model = steer(toy_model(), [5.0, 5.0, -5.0, -5.0])
    steer(model, [-5.0, 5.0, 5.0, -5.0], name='body.moe')
    runner = make_runner(model, [hook(), BALANCING], optim_wrapper=FROZEN)
    runner.train()
    for warning in ('stem: [2, 3] of 4', 'body.moe: [0, 3] of 4'):
        assert f'DEAD EXPERTS in {warning}' in log_of(runner)
    for layer in ('stem', 'body.moe'):
        assert f'COLLAPSED ROUTING in {layer}' in log_of(runner)


@pytest.mark.parametrize(('warmup', 'reports'), [(0, 1), (3, 2), (4, 3), (5, None)])
def test_warm_up(warmup, reports, make_runner, toy_model):
    """Reports after iterations 2 and 4, and of the validation at the end; the first that warns."""
    model = steer(toy_model(), [5.0, 5.0, -5.0, -5.0])
    runner = make_runner(model, [hook(warmup_iters=warmup), BALANCING], optim_wrapper=FROZEN)
    runner.train()
    for warning in ('COLLAPSED ROUTING in stem', 'DEAD EXPERTS in stem'):
        before, warned, _ = log_of(runner).partition(warning)
        assert bool(warned) == (reports is not None)
        assert len(re.findall(r'MoE \(\w+\) stem: load', before)) == (reports or 3)


@pytest.mark.parametrize(
    ('router', 'hooks', 'unbalanced'),
    [
        (None, [], 'stem, body.moe'),
        (None, [{**BALANCING, 'layers': 'stem'}], 'body.moe'),
        (None, [BALANCING], None),
        (RELATIVE, [], None),
    ],
)
def test_no_balancing(router, hooks, unbalanced, make_runner, toy_model):
    runner = make_runner(toy_model(router), [hook(), *hooks], max_iters=1)
    runner.train()
    warning = f'NO BALANCING: nothing keeps the experts of {unbalanced} in use'
    assert ('NO BALANCING' in log_of(runner)) == (unbalanced is not None)
    assert (warning in log_of(runner)) == (unbalanced is not None)


def test_one_expert_needs_no_balancing(make_runner, toy_model):
    runner = make_runner(toy_model(num_experts=1), [hook()], max_iters=2)
    runner.train()
    assert not [w for w in ('DEAD', 'COLLAPSED', 'NO BALANCING') if w in log_of(runner)]


def test_model_without_moe_layers(make_runner, dense_model):
    runner = make_runner(dense_model, [hook()])
    with pytest.raises(ConfigError, match='ExpertUtilizationHook found no MoE layer in DenseModel'):
        runner.train()


class MaskRecorder(Hook):
    """The masks that each batch is routed with, and what was decided."""

    def __init__(self):
        self.masks, self.decisions = {}, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        layers = find_moe_layers(runner.model).values()
        self.masks[runner.iter] = [m.router.constraint.masked().tolist() for m in layers]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layers = find_moe_layers(runner.model).values()
        self.decisions[runner.iter] = [m.routing.expert_ids.tolist() for m in layers]


@pytest.mark.parametrize(
    'constraint',
    [
        {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.1},
        {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 0.02},
    ],
    ids=lambda c: c['type'],
)
def test_a_resumed_run_masks_like_an_uninterrupted_one(constraint, make_runner, toy_model):
    def run(name, max_iters, **options):
        torch.manual_seed(3)
        recorder = MaskRecorder()
        model = toy_model({'constraint': constraint})
        runner = make_runner(model, [hook(), recorder], max_iters, name=name, **options)
        runner.train()
        return recorder, model.state_dict()

    whole, whole_state = run('whole', 4)
    first, _ = run('parts', 2)
    second, second_state = run('parts', 4, resume=True)
    assert set(first.masks) == {0, 1}
    assert set(second.masks) == {2, 3}
    assert {**first.masks, **second.masks} == whole.masks
    assert {**first.decisions, **second.decisions} == whole.decisions
    assert any(any(mask) for mask in whole.masks[2])  # there is something to restore
    for name, value in whole_state.items():
        torch.testing.assert_close(second_state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    'loss',
    [
        {'type': 'mmdet_moe.RouterZLoss'},
        {'type': 'mmdet_moe.VarianceLoss'},
        {'type': 'mmdet_moe.EntropyLoss', 'over': 'item'},
        {'type': 'mmdet_moe.ImportanceLoss', 'weight': 0.0},
    ],
    ids=lambda loss: loss['type'],
)
def test_loss_that_balances_nothing_is_no_balancing(make_runner, toy_model, loss):
    balancing = {'type': 'mmdet_moe.BalancingLossHook', 'loss': loss}
    runner = make_runner(toy_model(), [hook(), balancing], max_iters=1)
    runner.train()
    assert 'NO BALANCING' in log_of(runner)


def test_validation_alone_warns_at_once(make_runner, toy_model):
    model = steer(toy_model(), [5.0, 5.0, -5.0, -5.0])
    runner = make_runner(model, [{'type': 'mmdet_moe.ExpertUtilizationHook'}])
    runner.val()
    assert 'DEAD EXPERTS in stem: [2, 3] of 4' in log_of(runner)
