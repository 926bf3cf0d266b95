"""The configs of rotated images: what they are, and runs on data in the published formats."""

import json
from pathlib import Path

import miniature
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS, logged

from mmdet_moe import cli
from mmdet_moe.analysis import command
from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.analysis.report import figures
from mmdet_moe.engine.dry_run import image_size
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import count_flops

ROTATE = sorted(CONFIGS.glob('moe_rotate_*.py'))
NETWORKS = {'resnet18': ('ResNet_CIFAR', 512), 'mobilenetv2': ('MobileNetV2_CIFAR', 1280)}
DATA = {'cifar10': ('mmdet_moe.CIFAR10', 3), 'fashion_mnist': ('FashionMNIST', 1)}


def test_all_are_there():
    expected = {
        f'moe_rotate_{network}_{data}{variant}'
        for network in NETWORKS
        for data in DATA
        for variant in ('', '_single')
    }
    assert {path.stem for path in ROTATE} == expected


@pytest.mark.parametrize('path', ROTATE, ids=lambda path: path.stem)
def test_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path)
    network, data = path.stem.removeprefix('moe_rotate_').removesuffix('_single').split('_', 1)
    for loader, split in (('train', 'train'), ('val', 'test'), ('test', 'test')):
        dataset = cfg[f'{loader}_dataloader'].dataset
        assert (dataset.type, dataset.angle) == ('mmdet_moe.RotatedPairs', 30)
        assert (dataset.dataset.type, dataset.dataset.split) == (DATA[data][0], split)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    name, features = NETWORKS[network]
    is_single = path.stem.endswith('_single')
    assert (model.moe.num_experts, model.moe.top_k) == (1 if is_single else 4, 1)
    for expert in model.moe.experts:
        assert type(expert.backbone).__name__ == name
        assert expert.head.fc.weight.shape == (2, features)
    router = model.moe.router
    assert (router.noise, router.softmax) == ('uniform', 'over_all')
    (loss,) = [hook['loss'] for hook in cfg.custom_hooks if 'loss' in hook]
    assert loss == dict(type='mmdet_moe.SwitchLoss', weight=0.2)
    # Three strides in all.
    model.eval()
    with torch.no_grad():
        (y,) = model.moe.experts[0].backbone(torch.randn(1, DATA[data][1], 32, 32))
    assert y.shape == (1, features, 4, 4)
    assert image_size(cfg) == {1: (28, 28), 3: (32, 32)}[DATA[data][1]]
    with pytest.raises(ConfigError, match='--tta: the config needs tta_pipeline'):
        cli._set_tta(cfg)
    assert len(cfg.data_preprocessor.mean) == len(cfg.data_preprocessor.std) == DATA[data][1]


def test_single_is_one_line_away():
    for path in ROTATE:
        if path.stem.endswith('_single'):
            lines = path.read_text().splitlines()[1:]
            base = path.stem.removesuffix('_single')
            assert lines == [f"_base_ = './{base}.py'", 'model = dict(num_experts=1)']


def test_equal_active_cost():
    """A mixture computes one network and its router, which is next to nothing."""
    init_default_scope('mmpretrain')
    mixture, single = (
        MODELS.build(Config.fromfile(CONFIGS / f'moe_rotate_resnet18_cifar10{variant}.py').model)
        for variant in ('', '_single')
    )
    x = torch.randn(1, 3, 32, 32)
    assert count_flops(single, x) == count_flops(single.moe.experts[0], x)  # there is no choice
    router = 2 * 32 * 32 * 64 * (3 * 9) + 2 * 64 * 4  # a 3×3 convolution, a linear layer
    assert count_flops(mixture, x) == count_flops(single, x) + router
    assert router < 0.01 * count_flops(single, x)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Data in the published formats, of a size for a test, accepted as the published ones."""
    folder = miniature.write_cifar10(tmp_path / 'cifar10', num_train=20, num_test=10)
    miniature.expect_cifar(monkeypatch, folder)
    miniature.write_fashion_mnist(tmp_path / 'fashion_mnist', num_train=20, num_test=10)
    return tmp_path


SMALL = {
    'resnet18': [
        'model.expert.backbone.stem_channels=4',
        'model.expert.backbone.base_channels=4',
        'model.expert.head.in_channels=32',
    ],
    'mobilenetv2': ['model.expert.backbone.widen_factor=0.25'],
}


@pytest.mark.usefixtures('quick_analysis')
@pytest.mark.sweep(keep=1 / 3)
@pytest.mark.parametrize(
    'name',
    [
        'resnet18_fashion_mnist',
        'mobilenetv2_cifar10',
        'resnet18_cifar10_single',
    ],
)
def test_config_trains(name, folders, monkeypatch, capsys):
    """Narrow networks, one epoch; the rest is as the config says."""
    monkeypatch.chdir(folders)
    network, data = name.removesuffix('_single').split('_', 1)
    path = str(CONFIGS / f'moe_rotate_{name}.py')
    options = [f'data_root={folders / data}', 'train_dataloader.batch_size=20', *SMALL[network]]
    options += [f'{loader}_dataloader.num_workers=0' for loader in ('train', 'val')]
    cli.run_train([path, '--work-dir', 'run', '--cfg-options', *options, 'train_cfg.max_epochs=1'])
    report = json.loads(Path('run/expert_utilization_val.json').read_text())
    assert report['layers']['moe']['num_items'] == 20
    (metrics,) = [entry for entry in logged('run') if 'accuracy/top1' in entry]
    entropy = metrics['moe/dispatch_entropy']
    if name.endswith('_single'):
        # All ten classes equally often: what is known of the class without any expert.
        assert entropy == pytest.approx(2.302585, abs=1e-5)
        return
    assert 0 <= entropy <= 2.302586
    if data != 'fashion_mnist':
        return
    # All figures are drawn, and the one that is looked at is written.
    draw = figures.draw_figures
    monkeypatch.setattr(
        figures, 'draw_figures', lambda of: [f for f in draw(of) if f[1] == 'objects_cluster']
    )
    monkeypatch.setattr(command, 'write_figures', figures.write_figures)
    arguments = [path, 'run/epoch_1.pth', '--out', 'experts', '--cfg-options', *options]
    run_analysis([*arguments, 'test_dataloader.num_workers=0'])
    experts = json.loads(Path('experts/experts.json').read_text())
    assert experts['run']['classes'] == ['upright', 'rotated']
    assert experts['run']['num_images'] == 20
    assert experts['metrics']['accuracy'] == pytest.approx(metrics['accuracy/top1'] / 100)
    found = experts['layers']['moe']['associations']['objects']
    # Every image twice, and ten classes of one image each.
    counts = torch.tensor(found['class']['counts'], dtype=torch.float64)
    torch.testing.assert_close(counts.sum(1), torch.full((2,), 10.0).double())
    counts = torch.tensor(found['cluster']['counts'], dtype=torch.float64)
    torch.testing.assert_close(counts.sum(1), torch.full((10,), 2.0).double())
    assert found['cluster']['bins'][9] == 'Ankle boot'
    # H(cluster) = H(cluster | expert) + I(cluster; expert).
    assert found['cluster']['mi'] == pytest.approx(2.302585 - entropy, abs=1e-4)
    assert Path('experts/figures/moe/objects_cluster.png').stat().st_size > 5000
