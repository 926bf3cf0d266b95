"""What a checkout, an editable installation and an installed wheel give to other programs."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import modelindex
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmdet_moe
from mmdet_moe import cli, moe
from mmdet_moe.__main__ import commands, main
from mmdet_moe.errors import ConfigError
from research.experiments.scenes import DIGIT_SCENES, FASHION_SCENES

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
    """Folders to put onto Python's path: a checkout, and what pip makes of it and of its sdist."""
    tmp_path = tmp_path_factory.mktemp('package')
    checkout = tmp_path / 'checkout'
    for name in ('mmdet_moe', 'configs', 'research', 'tools'):
        ignored = shutil.ignore_patterns('__pycache__', 'lib')
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'model-index.yml'):
        shutil.copy(ROOT / name, checkout)
    backend = 'import setuptools.build_meta as backend; backend.build_{}(sys.argv[1])'
    # CUDA's would take a minute, and an editable installation needs none here.
    cpu_only = {'MMDET_MOE_CUDA_ARCHITECTURES': ';'}
    for kind, folder, variables in (
        ('sdist', checkout, {}),
        ('wheel', tmp_path / 'source', cpu_only),
        ('editable', checkout, cpu_only | {'CXX': 'false'}),
    ):
        built = tmp_path / f'dist-{kind}'
        done = run(folder, backend.format(kind), built, **variables)
        assert done.returncode == 0, done.stderr
        (file,) = built.iterdir()
        if kind == 'sdist':
            shutil.unpack_archive(file, built)
            (folder,) = (path for path in built.iterdir() if path.is_dir())
            folder.rename(tmp_path / 'source')
            continue
        with zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path / kind)
    return {'checkout': checkout, 'editable': tmp_path / 'editable', 'wheel': tmp_path / 'wheel'}


@pytest.mark.parametrize('place', ['checkout', 'editable', 'wheel'])
@pytest.mark.sweep(keep=1 / 3)
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


TOOLS_OF_MMDET = """
assert 'mmengine' not in sys.modules
import mmdet.apis

for tool, *arguments in (
    ('misc/print_config', 'child.py'),
    ('analysis_tools/get_flops', 'dense.py', '--num-images', '1'),
    ('analysis_tools/browse_dataset', 'digits.py', '--not-show', '--output-dir', 'drawn'),
    ('model_converters/publish_model', 'trained.pth', 'published.pth'),
):
    sys.argv = [tool, *arguments]
    path = f'{mmdet.__path__[0]}/.mim/tools/{tool}.py'
    runpy.run_path(path, run_name='__main__')
"""


@pytest.mark.parametrize('place', ['editable', 'wheel'])
@pytest.mark.sweep(keep=1 / 2)
def test_tools_of_the_toolboxes(places, place, tmp_path, digit_scenes_folder):
    """Nothing of theirs imports mmdet_moe before it reads the config."""
    (tmp_path / 'child.py').write_text(CHILD)
    for name, config in (('digits', 'moe_soft'), ('dense', 'dense')):
        (tmp_path / f'{name}.py').write_text(
            f"_base_ = 'mmdet_moe::demo/retinanet_{config}_digits.py'\n"
            'train_dataloader = dict(num_workers=0, persistent_workers=False)\n'
            'val_dataloader = dict(num_workers=0, persistent_workers=False)\n'
        )
    torch.save({'meta': {}, 'state_dict': {}, 'optimizer': {}}, tmp_path / 'trained.pth')
    root = str(digit_scenes_folder)
    done = run(tmp_path, TOOLS_OF_MMDET, site=places[place], DIGIT_SCENES_ROOT=root)
    assert done.returncode == 0, done.stderr
    assert "type='mmdet_moe.RelativeImportanceConstraint'" in done.stdout
    assert re.search(r'Flops: \d', done.stdout)
    assert len(list((tmp_path / 'drawn').iterdir())) == 16
    assert 'published model is saved at published-' in done.stdout


def test_wheel_holds_all_configs(places):
    assert (places['wheel'] / 'mmdet_moe' / 'py.typed').exists()  # type checkers read our types
    expected = {path.relative_to(CONFIGS) for path in CONFIGS.rglob('*.py')}
    folder = places['wheel'] / 'mmdet_moe' / 'configs'
    assert {path.relative_to(folder) for path in folder.rglob('*') if path.is_file()} == expected


SMOKE = """
import sys, torch, mmdet_moe
from mmengine.config import Config
from mmdet_moe.moe import MoELayer, find_moe_layers
from mmdet_moe.ops import native

assert mmdet_moe.__file__.startswith(sys.prefix), mmdet_moe.__file__
cpu = next(entry for entry in native.kernels() if entry.device == 'cpu')
layer = MoELayer(torch.nn.Conv2d(4, 4, 1), num_experts=3, top_k=2, in_channels=4)
layer(torch.ones(2, 4, 8, 8)).sum().backward()
print(cpu.native, layer.routing.load().sum().item(), Config.fromfile('front.py').model.type)
print([name for name in ('mmdet', 'mmpretrain', 'mmcv') if name in sys.modules])
"""


@pytest.fixture(scope='session')
def installed(places, tmp_path_factory):
    """The wheel, and the scripts of a new environment with it."""
    tmp_path = tmp_path_factory.mktemp('installed')
    (wheel,) = places['wheel'].parent.glob('dist-wheel/*.whl')
    venv.create(tmp_path / 'venv', symlinks=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    (site_packages,) = (tmp_path / 'venv' / 'lib').glob('*/site-packages')
    (site_packages / 'base.pth').write_text(sysconfig.get_path('purelib'))
    command = ['-m', 'pip', 'install', '--disable-pip-version-check', '--no-deps', '--no-index']
    command += ['--ignore-installed', str(wheel)]  # what the tests run from is no obstacle
    subprocess.run([python, *command], check=True, capture_output=True)
    return wheel, python.parent


def test_installed_wheel(installed, tmp_path):
    """Kernels, configs and the core, from a folder that has nothing to do with the checkout."""
    wheel, scripts = installed
    (tmp_path / 'front.py').write_text("_base_ = 'mmdet_moe::demo/retinanet_moe_soft_digits.py'")
    command = [scripts / 'python', '-c', SMOKE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean())
    assert done.returncode == 0, done.stderr
    has_kernels = not wheel.name.endswith('-any.whl')
    assert done.stdout.split('\n')[:2] == [f'{has_kernels} 4.0 RetinaNet', '[]']
    if has_kernels and sys.platform == 'linux':
        needed = needed_glibc(scripts.parent)
        assert re.search(rf'-py3-none-manylinux_2_{needed}_\w+\.whl$', wheel.name)


def clean():
    """The environment without what lets this process find the checkout."""
    return {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}


def needed_glibc(folder):
    """The minor version of the C library whose symbols the kernels use, by binutils."""
    (kernel,) = folder.rglob('mmdet_moe_cpu.so')
    command = [shutil.which('objdump') or pytest.skip('needs binutils'), '-T', str(kernel)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(17, *(int(minor) for minor in re.findall(r'GLIBC_2\.(\d+)', listing)))


def test_commands_of_the_wheel(installed, tmp_path):
    """One for each tool that needs no checkout; each is the file of tools/."""
    scripts = installed[1]
    done = subprocess.run(
        [scripts / 'mmdet-moe', '--help'], cwd=tmp_path, capture_output=True, text=True, env=clean()
    )
    listed = set(re.findall(r'^  ([\w-]+)  ', done.stdout, re.MULTILINE))
    in_checkout = set(commands())
    assert in_checkout - listed == {'demo', 'gpu', 'reproduce'}
    assert listed < in_checkout
    assert {'analyze', 'benchmark', 'edit', 'prepare-data', 'test', 'train'} <= listed
    (tools,) = scripts.parent.rglob('.mim/tools')
    for path in tools.glob('*.py'):
        assert path.read_bytes() == (ROOT / 'tools' / path.name).read_bytes()
        assert needs_no_checkout(path, tools.parent), path


def needs_no_checkout(path, folder):
    """Whether all that a tool imports of the checkout is in the folder, too."""
    names = re.findall(
        r'^\s*from ((?:research|projects)[\w.]*) import', path.read_text(), re.MULTILINE
    )
    return all((folder / f'{name.replace(".", "/")}.py').exists() for name in names)


def test_commands(capsys):
    """In this process, which goes on as it was."""
    before = sys.modules['__main__'], sys.argv, [*sys.path]
    main(['list-layers', '--help'])
    assert (sys.modules['__main__'], sys.argv, sys.path) == before
    assert capsys.readouterr().out.startswith('usage: mmdet-moe list-layers [-h]')
    with pytest.raises(SystemExit) as exit_:
        main(['prepare-data', 'check', 'nowhere'])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith('error: nowhere has neither train.json')
    assert (sys.modules['__main__'], sys.argv, sys.path) == before
    with pytest.raises(SystemExit) as exit_:
        main(['trian'])
    assert exit_.value.code == 2
    assert "no command 'trian'; choose one of analyze, " in capsys.readouterr().err
    main(['--version'])
    assert capsys.readouterr().out == f'mmdet_moe {mmdet_moe.__version__}\n'


def test_commands_without_the_toolboxes(tmp_path):
    code = NO_TOOLBOX.format(blocked=MORE_THAN_THE_CORE)
    code += "from mmdet_moe.__main__ import main; main(['analyze', 'config.py', 'weights.pth'])"
    done = run(tmp_path, code, site=ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(
        r"error: analyze needs the package \w+, which is not installed; .*\[all\]'", line
    )


def test_autoload_can_be_off(places, tmp_path):
    code = "print('mmdet_moe' in sys.modules, 'torch' in sys.modules)"
    for value, loaded in (('1', True), ('0', False)):
        done = run(tmp_path, code, site=places['wheel'], MMDET_MOE_AUTOLOAD=value)
        assert done.stdout.strip() == f'{loaded} False'


def test_model_index():
    """The figures are those of the docs, of configs as they stand."""
    models = modelindex.load(str(ROOT / 'model-index.yml')).models
    results = (ROOT / 'docs' / 'results.md').read_text()
    for scenes, start in ((DIGIT_SCENES, 'digit-scenes'), (FASHION_SCENES, 'fashion-scenes')):
        table = results.split(f'<!-- {start}:begin -->')[1]
        for method in scenes.methods:
            row = re.search(rf'^\| {re.escape(method.name)} \| 3 \| (.*)', table, re.MULTILINE)
            ap, ap50 = (float(cell.split()[0]) for cell in row[1].split(' | ')[:2])
            (model,) = (m for m in models if m.config == f'configs/{method.config}.py')
            (result,) = model.results
            measured = {'box AP': round(ap * 100, 1), 'box AP50': round(ap50 * 100, 1)}
            assert result.metrics == measured
    assert len(models) == len(DIGIT_SCENES.methods) + len(FASHION_SCENES.methods)
    assert all((ROOT / model.config).is_file() for model in models)


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
#: What an installation without extras lacks.
MORE_THAN_THE_CORE = ('mmdet', 'mmpretrain', 'mmcv', 'torchvision', 'plotly', 'scipy')
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
    code = NO_TOOLBOX.format(blocked=MORE_THAN_THE_CORE) + PLAIN_PYTORCH
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


def test_classifiers_are_analysed_without_mmdet(tmp_path):
    """Nor with what comes with it."""
    code = NO_TOOLBOX.format(blocked=('mmdet', 'pycocotools'))
    code += (
        'from mmdet_moe.analysis import command\nfrom mmdet_moe.analysis.image_demo import command'
    )
    done = run(tmp_path, code, site=ROOT)
    assert done.returncode == 0, done.stderr


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


def test_pre_commit_has_the_versions_of_the_tests():
    pinned = (ROOT / 'requirements/dev.txt').read_text()
    hooks = (ROOT / '.pre-commit-config.yaml').read_text()
    (version,) = re.findall(r'ruff-pre-commit\n +rev: v(.*)', hooks)
    assert f'ruff=={version}\n' in pinned
