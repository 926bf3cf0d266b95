"""The tools of the command line, on a tiny detector and a tiny data set."""

import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import running
import torch
from mmcv import transforms
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.registry import Registry
from running import ROOT, TOOLS, load_tool

from mmdet_moe import cli
from mmdet_moe.compat.distributed import check_launcher, init_cpu_group
from mmdet_moe.engine.explain import explain
from mmdet_moe.engine.image_errors import ImageErrorHook, ImageReader
from mmdet_moe.engine.preflight import check_checkpoint
from mmdet_moe.errors import ConfigError
from research import runs
from research.checks.interruptions import in_processes

DETECTOR = """
default_scope = 'mmdet'
data_root = 'data/nowhere/'
dataset = dict(
    type='CocoDataset',
    data_root=data_root,
    ann_file='all.json',
    data_prefix=dict(img='images/'),
    metainfo=dict(classes=('cat', 'dog')),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='PackDetInputs',
             meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ],
)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset,
)
test_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(test_mode=True, **dataset),
)
val_dataloader = test_dataloader
test_evaluator = dict(type='CocoMetric', ann_file=data_root + 'all.json', metric='bbox')
val_evaluator = test_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.001))
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    logger=dict(type='LoggerHook', interval=1),
)
log_processor = dict(by_epoch=False)
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0., 0., 0.], std=[255., 255., 255.], pad_size_divisor=32
    ),
    backbone=dict(type='ResNet', depth=18, base_channels=8),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, start_level=1, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=16, stacked_convs=1, feat_channels=16,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                              ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=5),
)
"""

CLASSIFIER = """
default_scope = 'mmpretrain'
data_root = 'data/nowhere'
loader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='labelled',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
train_dataloader = test_dataloader = loader
test_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False))
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, stem_channels=8, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64,
              loss=dict(type='CrossEntropyLoss')),
)
"""


def write_data(root):
    (root / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f'{index}.png' for index in range(4)]
    for index, name in enumerate(names):
        image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(root / 'images' / name), image)
        class_folder = root / 'labelled' / 'ab'[index % 2]
        class_folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(class_folder / name), image)
    content = dict(
        images=[dict(id=i, file_name=n, width=64, height=64) for i, n in enumerate(names)],
        annotations=[
            dict(id=i, image_id=i, category_id=i % 2, bbox=[8, 8, 30, 30], area=900, iscrowd=0)
            for i in range(4)
        ],
        categories=[dict(id=0, name='cat'), dict(id=1, name='dog')],
    )
    (root / 'all.json').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with both configs, and with the data at another place than they say."""
    path = tmp_path_factory.mktemp('cli')
    write_data(path / 'moved')
    (path / 'detector.py').write_text(DETECTOR)
    (path / 'classifier.py').write_text(CLASSIFIER)
    return path


@pytest.fixture
def here(folder, monkeypatch):
    """The folder as the working one."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    return folder


def start(folder, *command, **environment):
    env = {**os.environ, 'PYTHON': sys.executable, **environment}
    env.pop(cli.TRACEBACK_VARIABLE, None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def tool(folder, name, *arguments):
    return start(folder, sys.executable, str(TOOLS / name), *arguments)


MOVED = ('--cfg-options', 'data_root=moved')


@pytest.fixture(scope='module')
def trained(folder):
    """A training of two iterations through the tool, with validation."""
    options = (*MOVED, 'train_cfg.val_interval=2')
    return tool(folder, 'train.py', 'detector.py', '--work-dir', 'run', *options)


def failure(capsys, run, *arguments):
    """As that of running.py, of a tool."""
    return running.failure(capsys, run, [str(argument) for argument in arguments])


# Whole runs -----------------------------------------------------------------------------------


def test_train(folder, trained):
    assert trained.returncode == 0, trained.stderr
    assert (folder / 'run' / 'iter_2.pth').is_file()
    assert 'coco/bbox_mAP' in trained.stdout
    assert trained.stdout.count("torchvision stands in for mmcv's compiled ops") <= 1


def test_resume(here, trained, capfd):
    options = (*MOVED, 'train_cfg.max_iters=3')
    cli.run_train(['detector.py', '--work-dir', 'run', '--resume', '--no-validate', *options])
    output = ''.join(capfd.readouterr())
    assert 'resumed epoch: 0, iter: 2' in output
    assert 'Iter(train) [3/3]' in output
    assert 'Iter(train) [2/3]' not in output


def interrupt(monkeypatch, name):
    """From now on a training stops while it writes the checkpoint of that name, half of it."""
    put = LocalBackend.put

    def put_half(self, content, path):
        if Path(path).name != name:
            return put(self, content, path)
        put(self, content[: len(content) // 2], path)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalBackend, 'put', put_half)


@pytest.mark.parametrize('kept', [1, 2])
def test_resume_after_an_interrupted_save(here, monkeypatch, capfd, kept):
    run = Path(f'interrupted{kept}')
    options = [
        *MOVED,
        'train_cfg.max_iters=3',
        f'default_hooks.checkpoint.max_keep_ckpts={kept}',
    ]
    training = ['detector.py', '--work-dir', str(run), '--no-validate']
    with monkeypatch.context() as patch:
        interrupt(patch, 'iter_3.pth')
        with pytest.raises(KeyboardInterrupt):
            cli.run_train([*training, *options])
    assert {path.name for path in run.glob('*.pth')} >= {'iter_2.pth', 'iter_3.pth'}
    assert (run / 'last_checkpoint').read_text().endswith('iter_2.pth')
    capfd.readouterr()
    cli.run_train([*training, '--resume', *options])
    assert 'resumed epoch: 0, iter: 2' in ''.join(capfd.readouterr())
    assert (run / 'last_checkpoint').read_text().endswith('iter_3.pth')
    check_checkpoint(str(run / 'iter_3.pth'), 'checkpoint')


@pytest.mark.parametrize('runtime', ['classification', 'demo', 'default'])
def test_runtimes_keep_a_checkpoint_while_the_next_one_is_written(runtime):
    cfg = Config.fromfile(ROOT / 'configs' / '_base_' / f'{runtime}_runtime.py')
    assert cfg.default_hooks.checkpoint.max_keep_ckpts >= 2


def test_experiments_survive_an_interrupted_save(here, monkeypatch):
    run = here / 'interrupted_experiment'
    options = ['data_root=moved', 'default_hooks.checkpoint.max_keep_ckpts=1']
    with monkeypatch.context() as patch:
        interrupt(patch, 'iter_2.pth')
        with pytest.raises(KeyboardInterrupt):
            cli.run_train(['detector.py', '--work-dir', str(run), '--cfg-options', *options])
    assert {path.name for path in run.glob('*.pth')} == {'iter_1.pth', 'iter_2.pth'}
    options[0] = f'data_root={here / "moved"}'  # trainings of experiments run from the checkout
    with (run / 'output.log').open('w') as log:
        runs.train(here / 'detector.py', run, options, output=log)
    check_checkpoint(str(runs.latest_checkpoint(run)), 'checkpoint')


def run_tool(monkeypatch, name, *arguments):
    """The file as a program, in this process, which has imported the toolboxes."""
    monkeypatch.setattr(sys, 'argv', [name, *arguments])
    runpy.run_path(str(TOOLS / name), run_name='__main__')


@pytest.mark.usefixtures('trained')
def test_test_with_everything(here, monkeypatch, capfd):
    options = ('--work-dir', 'tested', '--show-dir', 'drawn', '--out', 'results.pkl', '--tta')
    run_tool(monkeypatch, 'test.py', 'detector.py', 'run/iter_2.pth', *options, *MOVED)
    assert 'coco/bbox_mAP' in capfd.readouterr().out
    assert len(list(here.glob('tested/*/drawn/*.png'))) == 4
    with open(here / 'results.pkl', 'rb') as file:
        results = pickle.load(file)
    assert [result['img_id'] for result in results] == [0, 1, 2, 3]


def test_tta_of_several_data_sets():
    """Each has a flipped variant, of its own pipeline."""
    pack = dict(type='PackDetInputs')
    pipelines = [[dict(type='LoadImageFromFile'), step, pack] for step in ({'a': 1}, {'b': 2})]
    parts = [dict(type='CocoDataset', pipeline=p) for p in pipelines]
    parts[1] = dict(type='RepeatDataset', times=2, dataset=parts[1])
    dataset = dict(type='ConcatDataset', datasets=parts)
    cfg = Config(dict(default_scope='mmdet', model={}, test_dataloader=dict(dataset=dataset)))
    cli._set_tta(cfg)
    first, second = cfg.test_dataloader.dataset.datasets
    for found, pipeline in ((first, pipelines[0]), (second.dataset, pipelines[1])):
        assert found.pipeline[:-1] == pipeline[:-1]
        flips, (packing,) = found.pipeline[-1].transforms
        assert [flip.prob for flip in flips] == [1.0, 0.0]
        assert packing.type == 'PackDetInputs'


def test_classifier(here, capsys):
    cli.run_train(['classifier.py', *MOVED])
    checkpoint = 'work_dirs/classifier/iter_1.pth'
    assert Path(checkpoint).is_file()
    cli.run_test(['classifier.py', checkpoint, '--tta', '--out', 'classes.pkl', *MOVED])
    no_hook = 'default_hooks.visualization=None'
    cli.run_test(['classifier.py', checkpoint, '--show-dir', 'drawn', *MOVED, no_hook])
    assert 'accuracy/top1' in ''.join(capsys.readouterr())
    assert len(pickle.loads(Path('classes.pkl').read_bytes())) == 4
    # As a detector's, and not in the current folder.
    assert len(list(Path('work_dirs/classifier').glob('*/drawn/*.png'))) == 4
    assert not Path('drawn').exists()
    absolute = here / 'elsewhere'
    cli.run_test(['classifier.py', checkpoint, '--show-dir', str(absolute), *MOVED])
    assert len(list(absolute.glob('*.png'))) == 4
    # MMEngine would test a head as it was drawn.
    state = torch.load(checkpoint, weights_only=False)
    weight = state['state_dict'].pop('head.fc.weight')
    torch.save(state, 'cut.pth')
    sentence = failure(capsys, cli.run_test, 'classifier.py', 'cut.pth', *MOVED)
    assert re.match(
        r"checkpoint: it lacks 1 of the model's \d+ tensors, such as 'head\.fc", sentence
    )
    state['state_dict']['head.fc.weight'] = torch.cat([weight, weight])
    torch.save(state, 'cut.pth')
    sentence = failure(capsys, cli.run_test, 'classifier.py', 'cut.pth', *MOVED)
    assert sentence.startswith('checkpoint: size mismatch for head.fc.weight: ')
    both = ('--tta', '--show-dir', 'drawn', *MOVED)
    sentence = failure(capsys, cli.run_test, 'classifier.py', checkpoint, *both)
    assert sentence.startswith('--tta does not go with --show')


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about machines without a GPU')
def test_two_processes_without_a_gpu(folder):
    arguments = ['detector.py', '--work-dir', 'both', '--launcher', 'pytorch']
    arguments += [*MOVED, 'train_cfg.val_interval=2']
    # As tools/dist_train.sh starts them, which test_train_moe.py does.
    in_processes(folder, lambda: cli.run_train(arguments), ranks=2)
    output = (folder / 'output.log').read_text()
    assert output.count('Iter(train) [2/2]') == 1  # one process speaks
    assert 'coco/bbox_mAP' in output
    # Two of the four images per process: one batch each.
    assert '[1/1]' in output
    state = torch.load(folder / 'both' / 'iter_2.pth', weights_only=False)['state_dict']
    assert not any(name.startswith('module.') for name in state)


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about machines without a GPU')
@pytest.mark.parametrize(
    ('has_bfloat16', 'said', 'dtype'),
    [
        (True, 'without a GPU: bfloat16', torch.bfloat16),
        (False, 'no instructions for bfloat16', torch.float32),
    ],
)
def test_amp_without_a_gpu(here, capsys, monkeypatch, has_bfloat16, said, dtype):
    monkeypatch.setattr('mmdet_moe.compat.amp.has_bfloat16', lambda: has_bfloat16)
    cfg = Config.fromfile('detector.py')
    cli._set_amp(cfg, requested=True)
    assert cfg.optim_wrapper.type == 'CpuAmpOptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper
    assert said in capsys.readouterr().out

    from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper

    model = torch.nn.Linear(2, 2)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 2)).dtype == dtype
    assert model.weight.dtype == torch.float32
    for type_ in (OptimWrapper, AmpOptimWrapper, 'mmengine.OptimWrapper'):
        cfg.optim_wrapper.type = type_
        cli._set_amp(cfg, requested=True)
        assert cfg.optim_wrapper.type == 'CpuAmpOptimWrapper'
    cfg.optim_wrapper.type = AmpOptimWrapper
    cli._set_amp(cfg, requested=False)
    assert cfg.optim_wrapper.type == 'CpuAmpOptimWrapper'
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(ConfigError, match=r'--amp: optim_wrapper\.type'):
        cli._set_amp(cfg, requested=True)


def test_defaults_of_a_wrapper_are_for_ddp_alone():
    for wrapper in (None, dict(type='MMDistributedDataParallel', static_graph=True)):
        found = cli._model_wrapper(Config(dict(model_wrapper_cfg=wrapper)))
        assert found['broadcast_buffers'] is False
        assert found['find_unused_parameters'] is False
    sharded = dict(type='MMFullyShardedDataParallel', use_orig_params=True)
    assert cli._model_wrapper(Config(dict(model_wrapper_cfg=sharded))) == sharded


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures('here')
def test_exit_status_and_stderr_of_the_tool(monkeypatch, capfd):
    with pytest.raises(SystemExit) as exit_:
        run_tool(monkeypatch, 'train.py', 'gone.py')
    assert exit_.value.code == 2
    assert capfd.readouterr().err == "error: there is no config file 'gone.py'\n"


def test_traceback_on_request(here, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, '1')
    with pytest.raises(ConfigError):
        cli.run_train(['gone.py'])


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('a = (', 'was never closed'),
        ("_base_ = 'gone.py'\n", 'gone.py'),
        ('a = undefined_name\n', "name 'undefined_name' is not defined"),
        ("default_scope = 'mmseg'\n", "default_scope must be 'mmdet' or 'mmpretrain', got 'mmseg'"),
        ('a = 1\n', "default_scope must be 'mmdet' or 'mmpretrain', got None"),
    ],
)
def test_broken_configs(here, capsys, content, expected):
    Path('broken.py').write_text(content)
    assert expected in failure(capsys, cli.run_train, 'broken.py')


def test_wrong_paths(here, capsys):
    sentence = failure(capsys, cli.run_train, 'detector.py')
    assert sentence.startswith('train_dataloader.dataset.data_root: there is no folder')
    sentence = failure(capsys, cli.run_train, 'detector.py', '--resume', 'gone.pth', *MOVED)
    assert sentence.startswith("--resume: there is no file 'gone.pth'; give the path")
    sentence = failure(capsys, cli.run_test, 'detector.py', 'gone.pth', *MOVED)
    assert sentence.startswith("checkpoint: there is no file 'gone.pth'; give the path")
    sentence = failure(capsys, cli.run_test, 'detector.py', 'gone.pth', '--out', 'x.json')
    assert sentence.startswith('--out must end in .pkl')


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ('optim_wrapper.optimizer.type=AdamWW', "no optimizer 'AdamWW'; did you mean 'AdamW'?"),
        ('optim_wrapper.optimizer.lr=fast', "optim_wrapper.optimizer: lr='fast' must be a finite"),
        ('optim_wrapper.optimizer.momentum=-1', "wrong value for type 'SGD': Invalid momentum"),
        ('val_evaluator=None', 'val_evaluator: the config has val_dataloader, but not val_eval'),
        ('val_evaluator.metric=box', "wrong value for type 'CocoMetric': metric should be one"),
        ('train_dataloader.batch_size=0', 'train_dataloader: batch_size=0 must be an integer'),
        ('train_dataloader.num_workers=two', "num_workers='two' must be an integer"),
        ('train_cfg.max_iters=many', "train_cfg: max_iters='many' must be a finite number"),
        ('train_cfg.val_interval=0', 'train_cfg: val_interval=0 must be an integer'),
    ],
)
def test_wrong_values(here, capsys, option, expected):
    """Of classes that are not ours, too."""
    assert expected in failure(capsys, cli.run_train, 'detector.py', *MOVED, option)
    assert not Path('work_dirs', 'detector', 'last_checkpoint').exists()


@pytest.mark.parametrize('key', ['router', 'experts'])
@pytest.mark.parametrize('use', ['', 'model = dict(backbone=dict({0}={0}))\n'])
def test_what_nobody_reads_in_a_config_file(tmp_path, key, use):
    """The parents have copied theirs into the model before."""
    base = ROOT / 'configs' / 'resnet18_moe_soft_cifar100.py'
    text = f"_base_ = '{base}'\n{key} = dict(type='mmdet_moe.GAPRouter', noise=False)\n"
    file = tmp_path / 'child.py'
    file.write_text(text + use.format(key))
    if use:
        assert cli.load_config(str(file)).model.backbone[key].noise is False
    else:
        with pytest.raises(ConfigError, match=f"child.py' sets `{key}`, but the .*model"):
            cli.load_config(str(file))


def test_folders_that_cannot_be_written(here, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, 'access', lambda path, mode: Path(path) != here / 'locked')
    (here / 'locked').mkdir()
    sentence = failure(capsys, cli.run_train, 'detector.py', '--work-dir', 'locked/new/run', *MOVED)
    assert sentence.startswith(f"--work-dir: nothing can be written into '{here}/locked'; choose")
    sentence = failure(
        capsys, cli.run_test, 'detector.py', 'any.pth', '--out', 'locked/x.pkl', *MOVED
    )
    assert sentence.startswith(f"--out: nothing can be written into '{here}/locked'; choose")
    assert not list((here / 'locked').iterdir())
    sentence = failure(capsys, cli.run_train, 'detector.py', '--work-dir', 'detector.py/run')
    assert sentence == f"--work-dir: '{here}/detector.py' is a file; choose a folder"


def test_launcher_without_a_launcher(here, capsys, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('LOCAL_RANK', '0')
    sentence = failure(capsys, cli.run_train, 'detector.py', '--launcher', 'pytorch')
    assert 'RANK' in sentence
    assert 'tools/dist_train.sh' in sentence


def test_auto_scale_lr_needs_a_base(here, capsys):
    arguments = ('--auto-scale-lr', *MOVED, 'auto_scale_lr=None')
    sentence = failure(capsys, cli.run_train, 'detector.py', *arguments)
    assert 'auto_scale_lr.base_batch_size' in sentence


def test_misspelt_types(here, capsys):
    def sentence(*options):
        return failure(capsys, cli.run_train, 'detector.py', *MOVED, *options)

    message = sentence('model.backbone.type=ResNett')
    assert message.startswith(
        "unknown type 'ResNett' in the registry of models: check its spelling"
    )
    hook = 'mmdet_moe.ExpertUtilisationHook'
    message = sentence(f'default_hooks.custom.type={hook}')
    assert message.startswith(f"unknown type '{hook}' in the registry of hooks; did you mean ")
    assert "'mmdet_moe.ExpertUtilizationHook'" in message
    message = sentence('default_hooks.custom.type=mmdet_moe.Qq')
    assert "unknown type 'mmdet_moe.Qq' in the registry of hooks; mmdet_moe has " in message
    assert 'ExpertUtilizationHook' in message


def test_misspelt_fields(here, capsys):
    def sentence(*options):
        return failure(capsys, cli.run_train, 'detector.py', *MOVED, *options)

    message = sentence('model.backbone.dept=18')
    assert message.startswith("wrong fields for type 'ResNet': ")
    assert message.endswith("did you mean 'depth'?")
    hook = 'default_hooks.custom'
    message = sentence(f'{hook}.type=mmdet_moe.ExpertUtilizationHook', f'{hook}.no_such_field=1')
    assert message.startswith("wrong fields for type 'mmdet_moe.ExpertUtilizationHook': ")
    assert "'no_such_field'" in message


def test_fields_that_a_base_class_takes(here, capsys):
    """Of a class that hands them on, as ResNet_CIFAR does."""
    backbone = ('model.backbone.type=ResNet_CIFAR', 'model.backbone.num_experts=4')
    message = failure(capsys, cli.run_train, 'classifier.py', *MOVED, *backbone)
    assert message.startswith("wrong fields for type 'ResNet_CIFAR': ")
    assert "'num_experts'; it takes depth, " in message


class Foreign:
    def __init__(self, depth):
        self.depth = depth


class HandsOn(Foreign):
    def __init__(self, **fields):
        super().__init__(**fields)


class CallsAnotherClass:
    def __init__(self, **fields):
        Foreign(**fields)


class CallsAMethod(Foreign):
    def __init__(self, **fields):
        self.build(fields)

    def build(self, fields):
        super().__init__(**fields)


@pytest.mark.parametrize('type_', [HandsOn, CallsAnotherClass, CallsAMethod])
def test_deep_errors_of_foreign_classes_keep_their_traceback(type_):
    """Unless the field only went up to a base class."""
    with pytest.raises(TypeError) as error:
        Registry('thing').build(dict(type=type_, dept=18))
    sentence = explain(error.value)
    if type_ is not HandsOn:
        assert sentence is None
        return
    assert sentence.startswith("wrong fields for type 'HandsOn': Foreign.__init__() got an ")
    assert sentence.endswith("did you mean 'depth'?")


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_named(here, capsys, tmp_path, workers):
    root = tmp_path / 'data'
    write_data(root)
    (root / 'images' / '2.png').write_bytes(b'no image')
    options = ('--cfg-options', f'data_root={root}', f'train_dataloader.num_workers={workers}')
    sentence = failure(
        capsys, cli.run_train, 'detector.py', '--work-dir', tmp_path / 'run', *options
    )
    assert sentence.startswith(f"cannot read the image '{root}/images/2.png': the file is damaged")


def test_image_reader(tmp_path):
    reader = ImageReader(LoadImageFromFile())
    path = tmp_path / 'image.png'
    with pytest.raises(ConfigError, match=r"image\.png': No such file or directory$"):
        reader({'img_path': str(path)})
    path.write_bytes(b'')  # OpenCV's own message has no name
    with pytest.raises(ConfigError, match=r"image\.png': the file is damaged"):
        reader({'img_path': str(path)})
    cv2.imwrite(str(path), np.zeros((4, 5, 3), np.uint8))
    assert pickle.loads(pickle.dumps(reader))({'img_path': str(path)})['img_shape'] == (4, 5)
    assert repr(reader) == repr(LoadImageFromFile())


def test_image_readers_inside_wrappers_are_wrapped():
    def pipeline():
        flips = transforms.TestTimeAug(transforms=[[dict(type='RandomFlip', prob=1.0)]])
        return Compose([LoadImageFromFile(), flips])

    parts = [SimpleNamespace(pipeline=pipeline()) for _ in range(2)]
    wrapped = SimpleNamespace(dataset=SimpleNamespace(datasets=parts))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=wrapped))
    runner = SimpleNamespace(_train_loop=loop, _val_loop={'type': 'ValLoop'}, _test_loop=None)
    for _ in range(2):  # a second run finds them wrapped
        ImageErrorHook().before_run(runner)
    for part in parts:
        assert isinstance(part.pipeline.transforms[0], ImageReader)
        assert isinstance(part.pipeline.transforms[0].inner, LoadImageFromFile)
        assert isinstance(part.pipeline.transforms[1], transforms.TestTimeAug)


def test_other_errors_keep_their_traceback():
    assert explain(RuntimeError('CUDA out of memory')) is None
    assert explain(KeyError('img')) is None
    assert explain(TypeError("f() got an unexpected keyword argument 'x'")) is None


def test_config_errors_behind_others_are_found():
    try:
        raise ConfigError('the field\nis wrong')
    except ConfigError as cause:
        error = RuntimeError('building failed')
        error.__cause__ = cause
    assert explain(error) == 'the field is wrong'


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('new', ['/data/other', '/data/other/'])
@pytest.mark.parametrize('old', ['data/coco', 'data/coco/'])
def test_apply_data_root(old, new):
    cfg = Config(
        dict(
            data_root=old,
            loaders=[dict(data_root='data/coco/'), dict(data_root='data/coco')],
            ann_file='data/coco/annotations/a.json',
            nested=dict(pair=('data/coco/b', 3), other='data/coco2017/c', sub='x/data/coco/d'),
        )
    )
    cli.apply_data_root(cfg, new)
    assert cfg.data_root.rstrip('/') == '/data/other'
    assert [loader.data_root for loader in cfg.loaders] == ['/data/other/', '/data/other']
    assert cfg.ann_file == '/data/other/annotations/a.json'
    assert cfg.nested.pair == ('/data/other/b', 3)
    assert cfg.nested.other == 'data/coco2017/c'
    assert cfg.nested.sub == 'x/data/coco/d'


@pytest.mark.parametrize('content', [{}, {'data_root': ''}, {'data_root': None}])
def test_apply_data_root_without_a_root(content):
    with pytest.raises(ConfigError, match='no top-level data_root'):
        cli.apply_data_root(Config(content), 'x')


def test_options_beside_data_root_are_kept(here):
    cfg = cli.load_config('detector.py', {'data_root': 'moved', 'train_cfg.max_iters': 7})
    assert cfg.train_cfg.max_iters == 7
    assert cfg.val_evaluator.ann_file == 'moved/all.json'
    assert cfg.train_dataloader.dataset.data_root == 'moved/'


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_no_worker_is_kept_where_there_is_none(scope):
    loaders = {
        'train_dataloader': dict(num_workers=0, persistent_workers=True, prefetch_factor=2),
        'val_dataloader': dict(num_workers=2, persistent_workers=True),
        'test_dataloader': dict(persistent_workers=True),
    }
    cfg = Config(dict(default_scope=scope, **loaders))
    cli.set_loader_defaults(cfg)
    assert [cfg[loader].persistent_workers for loader in loaders] == [False, True, False]
    assert 'prefetch_factor' not in cfg.train_dataloader
    cfg = Config(
        dict(default_scope=scope, train_dataloader=dict(num_workers=2), val_dataloader=None)
    )
    cli.set_loader_defaults(cfg)
    # MMPretrain's configs rely on its tools for the field.
    assert cfg.train_dataloader.get('persistent_workers', False) == (scope == 'mmpretrain')


@pytest.mark.parametrize(
    ('name', 'advice'),
    [
        ('resnet18_moe_soft_cifar100', 'set it there, model.backbone.router.noise=...'),
        ('retinanet_moe_soft_coco', 'set it there, model.bbox_head.router.noise=...'),
        ('faster_rcnn_moe_soft_coco', 'set it there, model.roi_head.bbox_head.router.noise=...'),
        ('moe_rotate_resnet18_cifar10', 'set it there, model.router.noise=...'),
        ('resnet18_moe_dense_cifar100', 'use the config of an MoE model'),
    ],
)
def test_where_the_router_is(name, advice):
    with pytest.raises(ConfigError, match=r'^--cfg-options router\.noise: ') as error:
        cli.load_config(str(ROOT / 'configs' / f'{name}.py'), {'router.noise': False})
    assert str(error.value).endswith(advice)


def test_nothing_to_resume(tmp_path, capsys):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='start.pth'))
    cli._set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (False, 'start.pth')
    assert 'nothing to resume' in capsys.readouterr().out


def test_resume_after_the_folder_was_moved(tmp_path, capsys):
    (tmp_path / 'last_checkpoint').write_text('/before/the/move/iter_2.pth')
    cfg = Config(dict(work_dir=str(tmp_path)))
    cli._set_resume(cfg, 'auto')
    assert not cfg.resume
    assert 'nothing to resume' in capsys.readouterr().out
    torch.save({}, tmp_path / 'iter_2.pth')
    cli._set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / 'iter_2.pth'))


def test_cpu_group_is_for_launchers_only():
    cfg = Config(dict(launcher='none'))
    assert not init_cpu_group(cfg)
    assert 'model_wrapper_cfg' not in cfg
    check_launcher('none')


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_say_how_to_use_them(script):
    done = start('.', 'bash', str(TOOLS / script))
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')


def test_slurm_script_passes_its_arguments_on(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = start(
        '.',
        'bash',
        str(TOOLS / 'slurm_train.sh'),
        *('part', 'job', 'a config.py', 'work', '--amp'),
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS='2',
        SRUN_ARGS='--time=1 --quiet',
    )
    passed = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    for argument in ('--partition=part', '--ntasks=2', '--gres=gpu:2', '--time=1', '--quiet'):
        assert argument in passed
    end = passed[passed.index('-u') + 1 :]
    assert end[1:] == ['a config.py', '--work-dir=work', '--launcher=slurm', '--amp']
    assert end[0].endswith('tools/train.py')


def test_the_tools_find_the_checkout():
    assert load_tool('train').run_train is cli.run_train


def test_nothing_to_draw_in(here, capsys):
    config = str(TOOLS.parent / 'projects' / 'cluster_theory' / 'configs' / 'mixture.py')
    Path('any.pth').touch()
    sentence = failure(capsys, cli.run_test, config, 'any.pth', '--show-dir', 'drawn')
    assert sentence == (
        '--show and --show-dir need images to draw in, which test_dataloader.dataset, '
        'ClusterPatches, has not'
    )


def test_where_the_experts_are():
    name, option = 'zoo/dino_r50_decoder', 'experts.0.num_experts'
    with pytest.raises(ConfigError, match=r'set it there, model\.experts\.0\.num_experts=\.\.\.'):
        cli.load_config(str(ROOT / 'configs' / f'{name}.py'), {option: 4})
    cfg = cli.load_config(str(ROOT / 'configs' / f'{name}.py'), {f'model.{option}': 4})
    assert cfg.model.experts[0].num_experts == 4


@pytest.mark.parametrize(('option', 'hint'), [
    ('optim_wraper.optimizer.lr', 'did you mean `optim_wrapper`?'),
    ('nonsense', 'check its name'),
])  # fmt: skip
def test_options_that_nobody_would_read(option, hint):
    path = str(ROOT / 'configs' / 'retinanet_moe_soft_coco.py')
    with pytest.raises(ConfigError) as error:
        cli.load_config(path, {option: 1})
    key = option.partition('.')[0]
    assert str(error.value).startswith(f'--cfg-options {option}: the config has no `{key}`, so ')
    assert str(error.value).endswith(hint)
    assert cli.load_config(path, {'find_unused_parameters': True}).find_unused_parameters
