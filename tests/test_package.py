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
from mmdet_moe import moe
from mmdet_moe.errors import ConfigError

ROOT = Path(mmdet_moe.__file__).parents[1]
CONFIGS = ROOT / 'configs'
CHILD = """\
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet_moe::_base_/balancing/hard_relative.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
"""


def run(cwd, *arguments, site=None, **variables):
    """Python without this environment's ``.pth`` files, and with those of ``site``."""
    paths = [] if site is None else [str(site)]
    variables['PYTHONPATH'] = os.pathsep.join([*paths, sysconfig.get_path('purelib')])
    start = (
        f'import runpy, site, sys; site.addsitedir({str(site)!r})' if site else 'import runpy, sys'
    )
    command = [sys.executable, '-S', '-c', f'{start}; sys.argv = sys.argv[1:]; ' + arguments[0]]
    return subprocess.run(
        [*command, 'program', *map(str, arguments[1:])],
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
    assert (child.model.type, child.model.bbox_head.num_classes) == ('RetinaNet', 80)
    assert child.model.bbox_head.router == child.router == fragment.router
    assert child.custom_hooks == fragment.custom_hooks
    front = Config.fromfile(tmp_path / 'dumped_front.py').to_dict()
    assert front == Config.fromfile(CONFIGS / 'retinanet_moe_soft_coco.py').to_dict()


@pytest.mark.parametrize('place', ['editable', 'wheel'])
def test_tools_of_the_toolboxes(places, place, tmp_path):
    """Nothing of theirs imports mmdet_moe before it reads the config."""
    (tmp_path / 'child.py').write_text(CHILD)
    code = (
        "assert 'mmengine' not in sys.modules; import mmdet; "
        "runpy.run_path(f'{mmdet.__path__[0]}/.mim/tools/misc/print_config.py', run_name='__main__')"
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
    with pytest.raises(
        ConfigError, match='nearest are mmdet_moe::_base_/balancing/hard_relative.py'
    ):
        Config.fromfile(tmp_path / 'child.py')


# As MMDetection's own mmdet/configs/, which its wheels do not hold.
PURE_BASE = """\
from mmdet.models import FPN, DetDataPreprocessor, ResNet, RetinaHead, RetinaNet
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

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
)
"""
PURE_CHILD = """\
from mmengine.config import read_base

with read_base():
    from toolbox.configs.retinanet import *
    from mmdet_moe.configs._base_.balancing.hard_relative import *

from mmdet_moe.models import MoERetinaHead

model.neck.update(type='mmdet_moe.MoEFPN', num_experts=3, top_k=2, router=router)
model.bbox_head.update(type=MoERetinaHead, num_experts=2, top_k=1, router=router)
"""


def test_pure_python_configs(tmp_path, monkeypatch):
    configs = tmp_path / 'toolbox' / 'configs'
    configs.mkdir(parents=True)
    (tmp_path / 'toolbox' / '__init__.py').touch()
    (configs / 'retinanet.py').write_text(PURE_BASE)
    (tmp_path / 'child.py').write_text(PURE_CHILD)
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
