"""What a checkout, an editable installation and an installed wheel give to other programs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

import mmdet_moe
from mmdet_moe import cli, moe
from mmdet_moe.errors import ConfigError

ROOT = Path(mmdet_moe.__file__).parents[1]
CONFIGS = ROOT / 'configs'
CHILD = """\
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet_moe::_base_/balancing/hard_relative.py',
]
model = dict(
    type='mmdet_moe.WithExperts',
    of='RetinaNet',
    router={{_base_.router}},
    experts=[dict(at='backbone.layer4', num_experts=4, top_k=2)],
)
"""


def run(cwd, code, *arguments, site=None, **variables):
    """Python without this environment's ``.pth`` files, and with those of ``site``."""
    paths = [] if site is None else [str(site)]
    variables['PYTHONPATH'] = os.pathsep.join([*paths, sysconfig.get_path('purelib')])
    start = 'import runpy, site, sys; sys.argv = sys.argv[1:]; '
    start += f'site.addsitedir({str(site)!r})\n' if site else '\n'
    return subprocess.run(
        [sys.executable, '-S', '-c', start + code, 'program', *map(str, arguments)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope='session')
def places(tmp_path_factory):
    """Folders to put onto Python's path: a checkout, and what pip makes of it."""
    tmp_path = tmp_path_factory.mktemp('package')
    checkout = tmp_path / 'checkout'
    for name in ('mmdet_moe', 'configs'):
        ignored = shutil.ignore_patterns('__pycache__', 'lib')
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ('setup.py', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, checkout)
    for kind in ('wheel', 'editable'):
        code = 'import setuptools.build_meta as backend; backend.build_{}(sys.argv[1])'
        # Kernels would take a minute.
        no_kernels = {'CXX': 'false', 'MMDET_MOE_CUDA_ARCHITECTURES': ';'}
        done = run(checkout, code.format(kind), tmp_path / f'dist-{kind}', **no_kernels)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / f'dist-{kind}').glob('*.whl')
        with zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path / kind)
    return {'checkout': checkout, 'editable': tmp_path / 'editable', 'wheel': tmp_path / 'wheel'}


@pytest.mark.parametrize('place', ['checkout', 'editable', 'wheel'])
def test_configs_by_name(places, place, tmp_path):
    """The values are those of the files of the checkout, whatever the place."""
    (tmp_path / 'child.py').write_text(CHILD)
    (tmp_path / 'front.py').write_text("_base_ = 'mmdet_moe::retinanet_moe_soft_coco.py'")
    code = (
        'import mmdet_moe; from mmengine.config import Config; print(mmdet_moe.__file__); '
        "[Config.fromfile(f'{name}.py').dump(f'dumped_{name}.py') for name in ('child', 'front')]"
    )
    done = run(tmp_path, code, site=places[place])
    assert done.returncode == 0, done.stderr
    home = places['wheel' if place == 'wheel' else 'checkout']
    assert done.stdout.strip() == str(home / 'mmdet_moe' / '__init__.py')

    child = Config.fromfile(tmp_path / 'dumped_child.py')
    fragment = Config.fromfile(CONFIGS / '_base_/balancing/hard_relative.py')
    assert (child.model.of, child.model.bbox_head.num_classes) == ('RetinaNet', 80)
    assert child.model.router == child.router == fragment.router
    assert child.custom_hooks == fragment.custom_hooks
    front = Config.fromfile(tmp_path / 'dumped_front.py').to_dict()
    assert front == Config.fromfile(CONFIGS / 'retinanet_moe_soft_coco.py').to_dict()


@pytest.mark.parametrize('place', ['editable', 'wheel'])
def test_tools_of_the_toolboxes(places, place, tmp_path):
    """Nothing of theirs imports mmdet_moe before it reads the config."""
    (tmp_path / 'child.py').write_text(CHILD)
    code = (
        "assert 'mmengine' not in sys.modules; import mmdet; "
        "tool = f'{mmdet.__path__[0]}/.mim/tools/misc/print_config.py'; "
        "runpy.run_path(tool, run_name='__main__')"
    )
    done = run(tmp_path, code, 'child.py', site=places[place])
    assert done.returncode == 0, done.stderr
    assert "type='mmdet_moe.RelativeImportanceConstraint'" in done.stdout


def test_wheel_holds_all_configs(places):
    expected = {path.relative_to(CONFIGS) for path in CONFIGS.rglob('*.py')}
    folder = places['wheel'] / 'mmdet_moe' / 'configs'
    assert {path.relative_to(folder) for path in folder.rglob('*') if path.is_file()} == expected


def test_unknown_config_is_told(tmp_path):
    (tmp_path / 'child.py').write_text("_base_ = 'mmdet_moe::_base_/balancing/hard_relativ.py'")
    with pytest.raises(ConfigError, match='nearest are mmdet_moe::_base_/balancing/hard_relative'):
        Config.fromfile(tmp_path / 'child.py')


NO_TOOLBOX = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
"""
PLAIN_PYTORCH = """
import torch
from mmdet_moe.moe import MoELayer, find_moe_layers

router = dict(type='mmdet_moe.GAPRouter', constraint=dict(type='mmdet_moe.BiasBalancing'))
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 1),
    MoELayer(torch.nn.Conv2d(4, 4, 1), num_experts=3, top_k=2, in_channels=4, router=router),
)
model(torch.ones(2, 3, 8, 8)).sum().backward()
print(find_moe_layers(model)['1'].routing.load().sum().item())
"""
USE_MODELS = """
from mmengine.registry import MODELS
import mmdet_moe.models as models
from mmdet_moe.errors import ConfigError

for name in sys.argv[1:]:
    try:
        print(name, MODELS.get(f'mmdet_moe.{name}') is getattr(models, name))
    except (ConfigError, AttributeError):
        try:
            MODELS.build(dict(type=f'mmdet_moe.{name}', num_experts=4))
        except ConfigError as error:
            print(name, error)
"""


def test_plain_pytorch_needs_no_toolbox(tmp_path):
    code = NO_TOOLBOX.format(blocked=('mmdet', 'mmpretrain', 'mmcv')) + PLAIN_PYTORCH
    done = run(tmp_path, code, site=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '4.0'


@pytest.mark.parametrize(
    ('blocked', 'missing'),
    [
        (('mmdet',), {'MoERetinaHead': 'mmdet', 'MoEFPN': 'mmdet', 'MoEResNet_CIFAR': None}),
        (('mmpretrain',), {'MoERetinaHead': None, 'MoEResNet_CIFAR': 'mmpretrain'}),
        (('mmcv', 'cv2'), {'MoERetinaHead': 'mmcv', 'ClassifierMixture': 'mmcv'}),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, tuple) else '',
)
def test_models_of_a_missing_toolbox(tmp_path, blocked, missing):
    code = NO_TOOLBOX.format(blocked=blocked) + USE_MODELS
    done = run(tmp_path, code, *missing, site=ROOT)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(' ', 1) for line in done.stdout.splitlines())
    for name, toolbox in missing.items():
        if toolbox is None:
            assert lines[name] == 'True'
        else:
            assert f'mmdet_moe.{name} needs {toolbox}, which is not installed' in lines[name]


# As MMDetection's own mmdet/configs/, which its wheels do not hold.
PURE_BASE = """\
from mmdet.models import FPN, DetDataPreprocessor, ResNet, RetinaHead, RetinaNet
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import (
    AnchorGenerator,
    DeltaXYWHBBoxCoder,
    MaxIoUAssigner,
    PseudoSampler,
)

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=ResNet, depth=18, out_indices=(1, 2, 3)),
    neck=dict(type=FPN, in_channels=[128, 256, 512], out_channels=8, num_outs=4),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        anchor_generator=dict(
            type=AnchorGenerator, scales=[4], ratios=[1.0], strides=[8, 16, 32, 64]
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, ignore_iof_thr=-1),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
    ),
)
"""
PURE_CHILD = """\
from mmengine.config import read_base

with read_base():
    from toolbox.configs.retinanet import *
    from mmdet_moe.configs._base_.balancing.hard_relative import *

from mmdet_moe.models import MoERetinaHead

model.update(
    type='mmdet_moe.WithExperts',
    of=model.type,
    router=router,
    experts=[dict(at='neck.fpn_convs.*', num_experts=3, top_k=2)],
)
model.bbox_head.update(type=MoERetinaHead, num_experts=2, top_k=1, router=router)
"""
PURE_TRAINING = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from torch.optim import SGD

train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset,
        data_root={root!r},
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        metainfo=dict(classes=('0', '1', '2')),
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=PackDetInputs),
        ],
    ),
)
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01))
"""


def test_pure_python_configs(tmp_path, monkeypatch, digit_scenes_folder):
    configs = tmp_path / 'toolbox' / 'configs'
    configs.mkdir(parents=True)
    (tmp_path / 'toolbox' / '__init__.py').touch()
    (configs / 'retinanet.py').write_text(PURE_BASE)
    training = PURE_TRAINING.format(root=str(digit_scenes_folder))
    (tmp_path / 'child.py').write_text(PURE_CHILD + training)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = Config.fromfile(tmp_path / 'child.py')
    fragment = Config.fromfile(CONFIGS / '_base_/balancing/hard_relative.py')
    assert cfg.custom_hooks == fragment.custom_hooks
    cfg.dump(tmp_path / 'dumped.py')
    for config in (cfg, Config.fromfile(tmp_path / 'dumped.py')):
        layers = moe.find_moe_layers(MODELS.build(config.model))
        assert {name: layer.num_experts for name, layer in layers.items()} == {
            'bbox_head.cls_moe': 2,
            'bbox_head.reg_moe': 2,
            **{f'neck.fpn_convs.{level}': 3 for level in range(3)},
        }
        for layer in layers.values():
            assert isinstance(layer.router.constraint, moe.RelativeImportanceConstraint)
    cli.run_train([str(tmp_path / 'child.py'), f'--work-dir={tmp_path / "work"}'])
    assert (tmp_path / 'work' / 'epoch_1.pth').exists()
