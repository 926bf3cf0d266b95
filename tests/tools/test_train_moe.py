"""MoE RetinaNets through the command line: training, resuming, upcycling, and mistakes."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.runner.checkpoint import _load_checkpoint as read_checkpoint
from running import ROOT, failure, logged

from mmdet_moe import cli
from mmdet_moe.engine.expert_report import ExpertReportHook

DEMO = ROOT / 'configs' / 'demo'
SMALL = (
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'model.backbone.base_channels=8',
    'model.backbone.stem_channels=8',
    'model.neck.in_channels=[8,16,32,64]',
    'model.neck.out_channels=16',
    'model.bbox_head.in_channels=16',
    'model.bbox_head.feat_channels=16',
    'train_pipeline.2.scale=(64,64)',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.checkpoint.max_keep_ckpts=5',
    'randomness.seed=0',
    'load_from=None',
)


@pytest.fixture
def run(tmp_path, digit_scenes_folder, monkeypatch):
    """``run(config, work_dir, iterations, *options)`` trains a shrunken demo model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)

    def train(config, work_dir, iterations, *options, arguments=()):
        fields = [f'data_root={digit_scenes_folder}', *SMALL]
        fields += [f'train_cfg.max_iters={iterations}', f'train_cfg.val_interval={iterations}']
        # The visualizer writes where the first run of a process wanted it.
        DetLocalVisualizer._instance_dict.clear()
        argv = [
            str(DEMO / f'{config}.py' if isinstance(config, str) else config),
            '--work-dir',
            work_dir,
            *arguments,
        ]
        cli.run_train([*argv, '--cfg-options', *fields, *options])
        return read_checkpoint(f'{work_dir}/iter_{iterations}.pth', map_location='cpu')

    return train


@pytest.mark.sweep(keep=2 / 5)
@pytest.mark.parametrize(
    ('config', 'loss_expected'),
    [
        ('retinanet_moe_soft_digits', True),
        ('retinanet_moe_soft_kl_digits', True),
        ('retinanet_moe_hard_digits', False),
        ('retinanet_moe_hard_mean_digits', False),
        ('retinanet_moe_loss_free_digits', False),
    ],
)
def test_every_balancing_trains_validates_and_reports(run, config, loss_expected):
    options = ('default_hooks.logger.interval=1', 'custom_hooks.0.interval=1')
    told = run(config, 'w', 2, *options)['meta']['expert_layers']
    assert list(told.values()) == [{'top_k': 2, 'granularity': 'image', 'grid_size': 1}] * 2
    lines = logged('w')
    losses = [line for line in lines if 'loss' in line]
    assert len(losses) == 2
    for line in losses:
        assert ('loss_moe_bbox_head_cls_moe' in line) == loss_expected
        parts = [value for key, value in line.items() if key.startswith('loss_')]
        assert line['loss'] == pytest.approx(sum(parts), rel=1e-4)
    report = json.loads(Path('w/expert_utilization_val.json').read_text())
    assert report['mode'] == 'val'
    assert set(report['layers']) == {'bbox_head.cls_moe', 'bbox_head.reg_moe'}
    for layer in report['layers'].values():
        assert layer['num_items'] == 8 * 5  # images × levels
        assert sum(layer['load']) == pytest.approx(1)
    names = {key for line in lines for key in line}
    assert {'train/moe/bbox_head.cls_moe/load_0', 'val/moe/bbox_head.reg_moe/mi_input'} <= names


def test_multilinear_mixtures_train_from_a_dense_checkpoint(run, capsys):
    dense = run('retinanet_dense_digits', 'dense', 1)['state_dict']
    options = ('load_from=dense/iter_1.pth', 'model.experts.0.num_experts=[4,4]')
    state = run('retinanet_mumoe_digits', 'w', 2, *options, 'model.experts.0.rank=8')['state_dict']
    assert all(value.isfinite().all() for value in state.values())
    gates = [key for key in state if '.gate.weights.' in key]
    assert gates == [f'neck.lateral_convs.{i}.gate.weights.{n}' for i in range(3) for n in range(2)]
    assert all(state[key].any() for key in gates)
    log = next(Path('w').glob('*/*.log')).read_text()
    row = 'neck.lateral_convs.0 ConvModule 4 × 4 all 0 pixel -'
    assert row in ' '.join(log.split())
    assert 'neck.lateral_convs.0: the weights of a dense ConvModule cannot be loaded' in log
    # The rest went on from the dense model.
    close = {'rtol': 0, 'atol': 0.05}
    for key in ('neck.fpn_convs.0.conv.weight', 'bbox_head.retina_cls.weight'):
        torch.testing.assert_close(state[key], dense[key], **close)
    message = failure(capsys, run, 'retinanet_mumoe_digits', 'w', 1)
    assert "rank='match' has 272 parameters to spend, of which the gate takes 256" in message


def test_resumed_run_equals_uninterrupted_one(run):
    """Weights and the state of the constraint; the data is the same batch in every iteration."""
    fixed = (
        'train_dataloader.sampler.shuffle=False',
        'train_dataloader.dataset.indices=2',
        'model.bbox_head.router.constraint.threshold=0.01',
        'param_scheduler=[]',
    )
    whole = run('retinanet_moe_hard_digits', 'whole', 4, *fixed)['state_dict']
    half = run('retinanet_moe_hard_digits', 'parts', 2, *fixed)['state_dict']
    both = run('retinanet_moe_hard_digits', 'parts', 4, *fixed, arguments=('--resume',))[
        'state_dict'
    ]
    state = 'bbox_head.cls_moe.router.constraint.relative_importance'
    assert not torch.equal(half[state], whole[state])
    assert whole[state].abs().max() > 0
    assert set(both) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_dense_checkpoint_becomes_experts(run):
    dense = run('retinanet_dense_digits', 'dense', 1)['state_dict']
    still = ('load_from=dense/iter_1.pth', 'optim_wrapper.optimizer.lr=0', 'param_scheduler=[]')
    moe = run('retinanet_moe_soft_digits', 'moe', 1, *still)['state_dict']
    for name in ('cls_convs.1.conv.weight', 'retina_cls.bias'):
        for expert in range(4):
            copied = moe[f'bbox_head.cls_moe.experts.{expert}.{name}']
            torch.testing.assert_close(copied, dense[f'bbox_head.{name}'])


def test_mistakes_are_one_sentence(run, capsys):
    soft, hard = 'retinanet_moe_soft_digits', 'retinanet_moe_hard_digits'
    head = 'model.bbox_head'
    for config, option, fragments in [
        (soft, f'{head}.top_k=5', ('top_k=5', 'num_experts=4')),
        (soft, f'{head}.num_experts=0', ('num_experts=0', 'at least 1')),
        (soft, f'{head}.router.type=mmdet_moe.GAPRoutr', ('GAPRoutr', 'GAPRouter')),
        (soft, 'custom_hooks.1.loss.type=mmdet_moe.ImportanceLos', ('ImportanceLos',)),
        (soft, f'{head}.router.softmax=none', ("softmax='none'", "'over_chosen'")),
        (hard, f'{head}.router.noise=True', ('noise=True', 'RelativeImportanceConstraint')),
        (hard, f'{head}.router.constraint.threshold=-1', ('threshold=-1',)),
        (soft, 'custom_hooks.1.layers=backbone.*', ('backbone.*', 'bbox_head.cls_moe')),
        (soft, f'{head}.moe_branches=[]', ('moe_branches',)),
        (soft, 'custom_hooks.1.loss.type=mmdet_moe.DatasetLoss', ('`dataset_source`', 'Joint')),
    ]:
        sentence = failure(capsys, run, config, 'mistake', 1, option)
        for fragment in fragments:
            assert fragment in sentence
    assert not list(Path('mistake').glob('*.pth'))


def test_checkpoint_of_another_number_of_experts(run, capsys):
    run('retinanet_moe_soft_digits', 'four', 1)
    sentence = failure(
        capsys, run, 'retinanet_moe_soft_digits', 'two', 1,
        'load_from=four/iter_1.pth', 'model.bbox_head.num_experts=2',
    )  # fmt: skip
    assert '4 experts in "bbox_head.cls_moe"' in sentence
    assert 'num_experts=4' in sentence


def test_nan_names_layer_and_iteration(run, capsys):
    # So large a learning rate spoils the weights in the first step; the second forward sees it.
    sentence = failure(
        capsys, run, 'retinanet_moe_soft_digits', 'nan', 3,
        'optim_wrapper.optimizer.lr=1e20', 'param_scheduler=[]', 'model.backbone.norm_eval=True',
    )  # fmt: skip
    assert 'bbox_head.cls_moe' in sentence
    assert 'iteration 2' in sentence


@pytest.mark.parametrize(
    ('config', 'options'),
    [('soft', ['model.bbox_head.router.noise=True']), ('hard', [])],  # noise, and a constraint
)
def test_the_log_says_what_became_experts(run, monkeypatch, config, options):
    """The same training as without, bit for bit."""
    config = f'retinanet_moe_{config}_digits'
    reported = run(config, 'w', 2, *options)
    log = ''.join(file.read_text() for file in Path('w').glob('*/*.log'))
    heading, _, row = log[log.index('Experts (FLOPs of one image') :].splitlines()[:3]
    assert '320×320' in heading
    assert row.startswith('bbox_head.cls_moe  {cls_convs,retina_cls}  4  2')
    monkeypatch.setattr(ExpertReportHook, 'before_train', lambda *_: None)
    silent = run(config, 's', 2, *options)
    assert 'Experts (' not in ''.join(file.read_text() for file in Path('s').glob('*/*.log'))
    for name, value in reported['state_dict'].items():
        assert torch.equal(value, silent['state_dict'][name]), name


def test_no_balancing_is_warned_about(run):
    run('retinanet_moe_unbalanced_digits', 'w', 1)
    log = ''.join(file.read_text() for file in Path('w').glob('*/*.log'))
    assert 'NO BALANCING' in log
    assert 'bbox_head.cls_moe, bbox_head.reg_moe' in log
    run('retinanet_moe_soft_digits', 'balanced', 1)
    assert 'NO BALANCING' not in ''.join(f.read_text() for f in Path('balanced').glob('*/*.log'))


def test_mmdetections_own_tool_runs_the_configs(run, digit_scenes_folder, tmp_path, monkeypatch):
    """With a compiled mmcv; here the stand-in is installed by importing mmdet_moe."""
    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    monkeypatch.setenv('DIGIT_SCENES_ROOT', str(digit_scenes_folder))
    options = [*SMALL, 'train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    # Of which our tool takes care.
    options += [f'{part}_dataloader.persistent_workers=False' for part in ('train', 'val')]
    config = str(DEMO / 'retinanet_moe_hard_digits.py')
    argv = ['train.py', config, '--work-dir', 'own', '--cfg-options', *options]
    monkeypatch.setattr(sys, 'argv', argv)
    runpy.run_path(str(tool), run_name='__main__')
    assert Path('own/iter_1.pth').is_file()
    assert Path('own/expert_utilization_val.json').is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about machines without a GPU')
def test_two_processes_route_together(tmp_path, digit_scenes_folder):
    """DDP without unused-parameter search: no hanging, and one balance over both ranks."""
    config = str(DEMO / 'retinanet_moe_hard_digits.py')
    options = [f'data_root={digit_scenes_folder}', *SMALL]
    options += ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    options.append('default_hooks.logger.interval=1')
    command = ['bash', str(ROOT / 'tools' / 'dist_train.sh'), config, '2', '--work-dir', 'both']
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, 'PYTHON': sys.executable, 'PORT': port, 'OMP_NUM_THREADS': '1'}
    environment['CUDA_VISIBLE_DEVICES'] = ''
    done = subprocess.run(
        [*command, '--cfg-options', *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # One process speaks.
    assert (done.stdout + done.stderr).count('Iter(train) [2/2]') == 1
    report = json.loads((tmp_path / 'both' / 'expert_utilization_val.json').read_text())
    # 8 images, shared out to two ranks, × 5 levels.
    assert {layer['num_items'] for layer in report['layers'].values()} == {8 * 5}
    state = read_checkpoint(str(tmp_path / 'both' / 'iter_2.pth'), map_location='cpu')['state_dict']
    assert not any(name.startswith('module.') for name in state)
    relative = state['bbox_head.cls_moe.router.constraint.relative_importance']
    assert relative.abs().max() > 0
    assert relative.sum().item() == pytest.approx(0, abs=1e-5)


def test_router_is_set_where_it_is_used(run, capsys):
    sentence = failure(
        capsys, run, 'retinanet_moe_hard_digits', 'r', 1, 'router.constraint.threshold=0.9'
    )
    assert 'model.bbox_head.router.constraint.threshold=' in sentence


def test_wrong_field_of_a_base_class_is_recognised(run, capsys):
    sentence = failure(
        capsys, run, 'retinanet_moe_soft_digits', 'w', 1, 'model.bbox_head.stacked_conv=2'
    )
    assert "did you mean 'stacked_convs'?" in sentence


def test_channels_last_trains_the_same_model(run):
    """Maps lie otherwise in memory, through dispatch and combine as well; the sums are the same."""
    seen = []

    def look(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            last = [
                x.is_contiguous(memory_format=torch.channels_last)
                for x in (module.weight, inputs[0])
            ]
            if last[0] and inputs[0].shape[1] > 3:  # not the dry run before, and not the images
                seen.append(last[1])

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        usual = run('retinanet_moe_soft_digits', 'usual', 2)['state_dict']
        assert not seen
        options = {'arguments': ('--channels-last',)}
        other = run('retinanet_moe_soft_digits', 'other', 2, **options)['state_dict']
        assert seen
        assert all(seen)
    finally:
        handle.remove()
    for name, value in usual.items():
        if value.is_floating_point():  # AdamW makes whole steps of gradients that are rounding
            assert (other[name] - value).norm() <= 1e-2 * value.norm() + 1e-3, name
