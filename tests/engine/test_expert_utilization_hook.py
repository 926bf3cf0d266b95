"""What the hook writes and shouts, in a Runner with a toy model."""

import json
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from ranks import run_on_ranks
from running import logged
from torch import nn
from toy_runs import ToyData

from mmdet_moe.drawing import draw_utilization
from mmdet_moe.engine.hooks import ExpertUtilizationHook, expert_utilization_hook
from mmdet_moe.errors import ConfigError, NonFiniteRouterError
from mmdet_moe.moe import MoELayer, MuMoEConv1x1, find_moe_layers
from mmdet_moe.moe.utilization import UtilizationReport

BALANCING = {
    'type': 'mmdet_moe.BalancingLossHook',
    'loss': {'type': 'mmdet_moe.ImportanceLoss', 'weight': 0.5},
}
RELATIVE = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.1}}
KINDS = ('load', 'inference_load', 'masked')
FROZEN = {'optimizer': {'type': 'SGD', 'lr': 0.0}}


def hook(**options):
    return {'type': 'mmdet_moe.ExpertUtilizationHook', 'interval': 2, 'warmup_iters': 0, **options}


def log_of(runner):
    (path,) = Path(runner.log_dir).glob('*.log')
    return path.read_text()


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
    entries = [e for e in logged(runner.log_dir) if 'train/moe/stem/load_0' in e]
    assert [e['step'] for e in entries] == [2, 4]
    for i, entry in enumerate(entries):
        both = [a + b for a, b in zip(*counter.loads[2 * i : 2 * i + 2], strict=True)]
        loads = [entry[f'train/moe/stem/load_{e}'] for e in range(4)]
        assert loads == pytest.approx([x / 16 for x in both])  # 2 batches of 4 images, k = 2
    names = {key for entry in logged(runner.log_dir) for key in entry}
    for statistic in ('importance_3', 'load_cv2', 'usage_entropy', 'decision_entropy', 'mi_input'):
        assert f'train/moe/body.moe/{statistic}' in names
    assert 'MoE (train) stem: load ' in log_of(runner)


def test_the_log_shows_what_masks_do(make_runner, toy_model):
    model = steer(toy_model(RELATIVE), [2.0, 2.0, 0.0, -1.0])
    runner = make_runner(model, [hook(interval=1)], optim_wrapper=FROZEN)
    runner.train()
    entries = [e for e in logged(runner.log_dir) if 'train/moe/stem/load_0' in e]
    first, second = (
        [[e[f'train/moe/stem/{kind}_{i}'] for i in range(4)] for kind in KINDS] for e in entries[:2]
    )
    # Experts 0 and 1 got half each, so that the second batch has to go to 2 and 3.
    assert first == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [1, 1, 0, 0]]
    assert second[:2] == [[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]


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
    assert any('val/moe/stem/load_0' in entry for entry in logged(runner.log_dir))

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
    entry = next(e for e in logged(runner.log_dir) if 'train/moe/stem/mi_input' in e)
    assert entry['train/moe/stem/mi_input'] > 0.5 * math.log(3)
    silent = ('DEAD', 'COLLAPSED', 'NO BALANCING', 'DISAGREE')
    assert not [w for w in silent if w in log_of(runner)]


def test_noise_that_balances_the_training_alone(make_runner, toy_model):
    """Logits far below the noise: whatever the image, inference takes the same two experts."""
    model = steer(toy_model({'noise': True}), [0.002, 0.001, -0.001, -0.002])
    runner = make_runner(model, [hook(interval=16), BALANCING], max_iters=16, optim_wrapper=FROZEN)
    runner.train()
    warning = (
        r'TRAINING AND INFERENCE DISAGREE in stem: the load is \[(.*?)\] in training and would '
    )
    found = re.search(warning + r'be \[0\.5, 0\.5, 0\.0, 0\.0\] at inference', log_of(runner))
    assert all(float(share) > 0.05 for share in found[1].split(', '))


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


@pytest.mark.parametrize('done', [False, True])
def test_a_start_that_never_came(done, make_runner, toy_model):
    """Four experts need 256 items; one batch holds far fewer."""
    model = toy_model({'init': 'kmeans'})
    model.body['moe'].router.start.done.fill_(1)
    model.stem.router.start.done.fill_(done)
    runner = make_runner(model, [hook(), BALANCING], max_iters=1)
    runner.train()
    warning = "NO K-MEANS START in stem: the training ended before init='kmeans' had the 256 items"
    assert (warning in log_of(runner)) == (not done)
    assert 'NO K-MEANS START in body.moe' not in log_of(runner)


def test_one_expert_needs_no_balancing(make_runner, toy_model):
    runner = make_runner(toy_model(num_experts=1), [hook()], max_iters=2)
    runner.train()
    assert not [w for w in ('DEAD', 'COLLAPSED', 'NO BALANCING') if w in log_of(runner)]


def test_model_without_moe_layers(make_runner, dense_model):
    runner = make_runner(dense_model, [hook()])
    with pytest.raises(ConfigError, match='ExpertUtilizationHook found no MoE layer in DenseModel'):
        runner.train()


def test_factorised_layers(make_runner, toy_model):
    """In validation and test as by hand; in training nobody looks at their coefficients."""
    model = toy_model()
    model.stem = MuMoEConv1x1(3, 3, 40, 6)
    nn.init.normal_(model.stem.gate.weights[0])
    runner = make_runner(model, [hook(), BALANCING], val_interval=2, optim_wrapper=FROZEN)
    runner.train()
    assert not model.stem._observers
    log = log_of(runner)
    assert 'MoE (train) body.moe' in log
    assert 'MoE (train) stem' not in log
    assert re.search(r'MoE \(val\) stem: load \S+ to \S+ of 40 experts', log)
    assert 'NO BALANCING' not in log
    report = json.loads((Path(runner.work_dir) / 'expert_utilization_val.json').read_text())
    stem = report['layers']['stem']
    pixels = ToyData().images.permute(0, 2, 3, 1).reshape(-1, 3)
    with torch.no_grad():
        (coefficients,) = model.eval().stem.coefficients(pixels)
    assert stem['num_items'] == len(pixels)
    assert stem['importance'] == pytest.approx(coefficients.mean(0).tolist(), abs=1e-6)
    active = (coefficients > 0).double().sum(0)
    assert stem['load'] == pytest.approx((active / active.sum()).tolist())
    names = {key for entry in logged(runner.log_dir) for key in entry if 'val/moe/stem' in key}
    assert 'val/moe/stem/load_max' in names
    assert 'val/moe/stem/load_39' not in names


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


# Pictures ----------------------------------------------------------------------------------------


def pictures_of(runner):
    return {path.name: path for path in Path(runner.log_dir).glob('vis_data/vis_image/*')}


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: the arguments of every call."""
    calls = []

    def draw(layer, level_shares, steps=(), load=(), importance=()):
        calls.append((layer, level_shares, list(steps), list(load), list(importance)))
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr('mmdet_moe.drawing.draw_utilization', draw)
    return calls


def test_pictures_on_disk_and_in_tensorboard(make_runner, toy_model, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr('mmdet_moe.drawing.draw_utilization', draw_utilization)
    backends = [{'type': 'LocalVisBackend'}, {'type': 'TensorboardVisBackend'}]
    visualizer = {'type': 'Visualizer', 'vis_backends': backends}
    runner = make_runner(toy_model(), [hook(), BALANCING], visualizer=visualizer, val_interval=2)
    runner.train()
    layers = 'experts_stem', 'experts_body.moe'
    paths = pictures_of(runner)
    assert set(paths) == {f'{layer}_{step}.png' for layer in layers for step in (2, 4)}
    for path in paths.values():
        height, width, channels = mmcv.imread(path).shape
        assert height > 300
        assert width > 600
        assert channels == 3

    events = EventAccumulator(str(Path(runner.log_dir) / 'vis_data')).Reload()
    assert set(events.Tags()['images']) == set(layers)
    for layer in layers:
        entries = events.Images(layer)
        assert [entry.step for entry in entries] == [2, 4]
        for entry in entries:
            picture = mmcv.imfrombytes(entry.encoded_image_string)
            assert (picture == mmcv.imread(paths[f'{layer}_{entry.step}.png'])).all()
    assert 'draws no more' not in log_of(runner)


def test_what_is_drawn(make_runner, toy_model, drawn):
    runner = make_runner(toy_model(), [hook(), BALANCING], val_interval=4, max_iters=6)
    runner.train()
    assert [(call[0], call[2]) for call in drawn] == [
        ('stem', [2, 4]),
        ('body.moe', [2, 4]),
        ('stem', [2, 4, 6]),
        ('body.moe', [2, 4, 6]),
    ]
    for layer, level_shares, steps, load, importance in drawn:
        told = [e for e in logged(runner.log_dir) if f'train/moe/{layer}/load_0' in e]
        for i in range(len(steps)):
            for name, shares in (('load', load), ('importance', importance)):
                expected = [told[i][f'train/moe/{layer}/{name}_{e}'] for e in range(4)]
                assert shares[i] == pytest.approx(expected)
        assert np.shape(level_shares) == (1, 4)
        assert sum(level_shares[0]) == pytest.approx(1)
    report = json.loads((Path(runner.work_dir) / 'expert_utilization_val.json').read_text())
    assert drawn[-1][1] == report['layers']['body.moe']['level_shares']


def test_a_training_without_validation_is_drawn_at_its_end(make_runner, toy_model, drawn):
    runner = make_runner(toy_model(), [hook(), BALANCING], max_iters=5)
    runner._val_loop = None
    runner.train()
    assert [(call[0], call[2]) for call in drawn] == [('stem', [2, 4]), ('body.moe', [2, 4])]
    assert set(pictures_of(runner)) == {'experts_stem_5.png', 'experts_body.moe_5.png'}


def test_validation_alone_draws_the_levels(make_runner, toy_model, drawn):
    runner = make_runner(toy_model(), [hook()])
    runner.val()
    assert [(call[0], call[2]) for call in drawn] == [('stem', []), ('body.moe', [])]


def test_a_resumed_run_goes_on_with_its_picture(make_runner, toy_model, drawn):
    def run(name, max_iters, num_experts=4, **options):
        torch.manual_seed(3)
        model = toy_model(num_experts=num_experts)
        make_runner(model, [hook(), BALANCING], max_iters, name=name, **options).train()
        return drawn[-1]

    whole = run('whole', 4)
    run('parts', 2)
    assert run('parts', 4, resume=True) == whole
    assert whole[2] == [2, 4]
    # Weights that are only loaded begin another training.
    checkpoint = str(Path(make_runner(toy_model(), name='parts').work_dir) / 'iter_4.pth')
    assert run('tuned', 2, load_from=checkpoint)[2] == [2]


def test_drawing_can_be_turned_off(make_runner, toy_model, drawn):
    runner = make_runner(toy_model(), [hook(draw=False), BALANCING], val_interval=2)
    runner.train()
    assert not drawn
    assert not pictures_of(runner)
    assert 'moe_utilization' not in runner.message_hub.runtime_info


def test_only_the_main_process_draws(make_runner, toy_model, drawn, monkeypatch):
    monkeypatch.setattr(expert_utilization_hook, 'is_main_process', lambda: False)
    make_runner(toy_model(), [hook(), BALANCING], val_interval=2).train()
    assert not drawn


def test_a_picture_that_fails_does_not_end_the_training(make_runner, toy_model, monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError('no fonts')

    monkeypatch.setattr('mmdet_moe.drawing.draw_utilization', fail)
    runner = make_runner(toy_model(), [hook(), BALANCING], val_interval=2)
    runner.train()
    assert runner.iter == 4
    # Said once, not at every validation.
    assert log_of(runner).count('draws no more pictures: ImportError: no fonts') == 1


def test_the_past_is_thinned_out_evenly():
    past = expert_utilization_hook._Past(2)
    for i in range(10_000):
        share = i / 10_000
        report = UtilizationReport(
            10,
            [share, 1 - share],
            [1 - share, share],
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            [[share, 1 - share]],
        )
        past.add(50 * (i + 1), report)
        if i in (0, 1, 254, 255, 256, 511, 512):
            assert past.series()['steps'][-1] == 50 * (i + 1)
            assert past.series()['load'][-1] == [share, 1 - share]
    series = past.series()
    steps = np.array(series['steps'])
    assert 100 < len(steps) <= 257
    assert (steps[0], steps[-1]) == (50, 500_000)
    assert len(set(np.diff(steps[:-1]))) == 1
    assert np.array(series['load'])[:, 0] == pytest.approx((steps / 50 - 1) / 10_000)
    assert np.array(series['importance'])[:, 1] == pytest.approx((steps / 50 - 1) / 10_000)
    assert len(pickle.dumps(past.content)) < 30_000

    again = expert_utilization_hook._Past(2, 500_000, pickle.loads(pickle.dumps(past.content)))
    assert again.series() == series
    # Of another layer, of the future, or of another version.
    assert expert_utilization_hook._Past(3, 500_000, past.content).series()['steps'] == []
    assert expert_utilization_hook._Past(2, 400_000, past.content).series()['steps'] == []
    assert expert_utilization_hook._Past(2, 9, {'step': [1]}).series()['steps'] == []


def test_nothing_is_saved_of_a_router_that_is_not_finite(make_runner, toy_model, tmp_path):
    """A GPU may not have told so yet: what is left to be read is read before a checkpoint."""
    runner = make_runner(toy_model(), [hook(), BALANCING])
    runner.train()
    layer = next(iter(find_moe_layers(runner.model).values()))
    layer._unread = (torch.tensor(False), _NoEvent(), 7)
    with pytest.raises(NonFiniteRouterError, match='not finite'):
        runner.save_checkpoint(str(tmp_path), 'broken.pth')
    assert not (tmp_path / 'broken.pth').exists()


class _NoEvent:
    """An event that has happened."""

    def synchronize(self):
        pass


def play(rank, world_size, folder):
    """A validation in which the second image, and the second rank, do not run a layer."""
    torch.manual_seed(0)
    layers = {name: MoELayer(nn.Conv2d(4, 4, 1), 4, 2, in_channels=4) for name in 'abc'}
    model, told = nn.ModuleDict(layers).eval(), []
    runner = SimpleNamespace(
        model=model, hooks=[], iter=0, work_dir=str(folder / str(rank)),
        logger=SimpleNamespace(info=lambda *words: told.append(words), warning=told.append),
        visualizer=SimpleNamespace(add_scalars=lambda *args, **kwargs: None),
        val_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo={})),
    )  # fmt: skip
    Path(runner.work_dir).mkdir()
    hook = ExpertUtilizationHook(draw=False)
    hook.before_run(runner)
    hook.before_val_epoch(runner)
    for i in range(3 * (rank == 0)):
        hook.before_val_iter(runner, i, {})
        for name in 'ab' if i != 1 else 'a':
            model[name](torch.randn(2, 4, 3, 3))
        hook.after_val_iter(runner, i, {})
    hook.after_val_epoch(runner)
    return [words for words in told if 'not run' in words[0]]


@pytest.mark.parametrize('world_size', [1, 2])
def test_what_is_not_run_is_not_counted(world_size, tmp_path):
    if world_size > 1:
        told, _ = run_on_ranks(play, 2, tmp_path, tmp_path)
    else:
        told = play(0, 1, tmp_path)
    report = json.loads((tmp_path / '0' / 'expert_utilization_val.json').read_text())
    assert {name: of['num_items'] for name, of in report['layers'].items()} == {'a': 6, 'b': 4}
    assert told == [('MoE (%s) %s: was not run', 'val', 'c')]
