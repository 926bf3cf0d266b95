"""The classification configs: what they are, and a run on data in the published file formats."""

import gzip
import json
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS

from mmdet_moe import cli, moe
from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.moe.flops import count_flops

SPARSE = sorted(CONFIGS.glob('resnet18_moe_*.py'))
MUMOE = sorted([*CONFIGS.glob('resnet18_mumoe_*.py'), *CONFIGS.glob('mlp_mixer_*.py')])
CLASSIFIERS = [*SPARSE, *MUMOE]
DATA = {'cifar100': ('mmdet_moe.CIFAR100', 3, 100), 'fashion_mnist': ('FashionMNIST', 1, 10)}

# Mean and standard deviation of the training images' pixels, as everyone who uses the data sets has
# them (Fashion-MNIST: 0.2860 and 0.3530 of 255), and the random crop: size and padding.
PREPROCESSING = {
    'cifar100': ([129.304, 124.070, 112.434], [68.170, 65.392, 70.418], 32, 4),
    'fashion_mnist': ([72.94], [90.02], 28, 2),
}
# Where Debian's package dataset-fashion-mnist puts them.
REAL_IMAGES = Path('/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz')

# Loss and constraint with their λ and m: 0.5, 0.5, 0.5 and 0.3 for classifiers in the paper.
BALANCING = {
    'soft_kl': (dict(type='mmdet_moe.KLLoss', weight=0.5), None),
    'soft': (dict(type='mmdet_moe.ImportanceLoss', weight=0.5), None),
    'hard_mean': (None, dict(type='mmdet_moe.MeanImportanceConstraint', threshold=0.3)),
    'hard': (None, dict(type='mmdet_moe.RelativeImportanceConstraint', threshold=0.5)),
    'unbalanced': (None, None),
    'switch': (dict(type='mmdet_moe.SwitchLoss', weight=0.01), None),
    'clustered': (dict(type='mmdet_moe.SwitchLoss', weight=0.01), None),
    'loss_free': (None, dict(type='mmdet_moe.BiasBalancing', update_rate=0.001)),
}
CIFAR100_ALONE = ('switch', 'clustered', 'loss_free')


def test_all_are_there():
    kinds = (*BALANCING, 'dense')
    expected = {f'resnet18_moe_{kind}_{data}' for kind in kinds for data in DATA}
    expected -= {f'resnet18_moe_{kind}_fashion_mnist' for kind in CIFAR100_ALONE}
    expected |= {f'resnet18_moe_{kind}_sgd_cifar100' for kind in ('soft', 'dense')}
    kinds = ('resnet18_mumoe', 'mlp_mixer_mumoe', 'mlp_mixer_dense')
    expected |= {f'{kind}_{data}' for kind in kinds for data in DATA}
    assert {path.stem for path in CLASSIFIERS} == expected


@pytest.mark.parametrize('path', SPARSE, ids=lambda path: path.stem)
def test_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    kind, data = next(
        (path.stem[len('resnet18_moe_') : -len(name) - 1], name)
        for name in DATA
        if path.stem.endswith(name)
    )
    recipe = 'sgd' if kind.endswith('_sgd') else 'adam'
    kind = kind.removesuffix('_sgd')
    dataset, channels, classes = DATA[data]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == dataset
        assert loader.batch_size == 128
    assert model.backbone.conv1(torch.randn(1, channels, 8, 8)).shape[1] == 64
    assert model.head.fc.weight.shape == (classes, 512)
    assert len(cfg.data_preprocessor.mean) == channels
    assert cfg.optim_wrapper.optimizer.type == {'sgd': 'SGD', 'adam': 'Adam'}[recipe]
    assert type(model.head.loss_module).__name__ == (
        'LabelSmoothLoss' if recipe == 'sgd' else 'CrossEntropyLoss'
    )
    layers = moe.find_moe_layers(model)
    if kind == 'dense':
        assert not layers
        return
    ((name, layer),) = layers.items()
    assert name == 'backbone.layer4'
    assert (layer.num_experts, layer.top_k) == (4, 2)
    loss, constraint = BALANCING[kind]
    losses = [hook['loss'] for hook in cfg.custom_hooks if 'loss' in hook]
    assert losses == ([loss] if loss else [])
    assert cfg.model.backbone.router.get('constraint') == constraint


@pytest.mark.parametrize('path', MUMOE, ids=lambda path: path.stem)
def test_multilinear_mixtures(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    data = next(name for name in DATA if path.stem.endswith(name))
    dataset, channels, classes = DATA[data]
    assert cfg.train_dataloader.dataset.type == dataset
    size = PREPROCESSING[data][2]
    assert model.eval()(torch.randn(2, channels, size, size)).shape[0] == 2
    assert model.head(model.extract_feat(torch.randn(2, channels, size, size))).shape == (
        2,
        classes,
    )
    layers = moe.find_expert_layers(model)
    if '_dense_' in path.stem:
        assert not layers
        return
    assert all(layer.num_experts in (16, 32, 64) for layer in layers.values())
    if path.stem.startswith('resnet18'):
        assert list(layers) == ['head.fc']
    else:
        blocks = 8 if data == 'cifar100' else 4
        assert len(layers) == 2 * blocks == 2 * len(model.backbone.layers)
    for layer in layers.values():
        dense = sum(p.numel() for p in layer.dense.parameters())
        found = sum(p.numel() for p in layer.parameters())
        # The head for 10 classes has no room for a gate.
        assert found <= dense or path.stem == 'resnet18_mumoe_fashion_mnist'


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda path: path.stem)
def test_preprocessing(path):
    data = next(name for name in DATA if path.stem.endswith(name))
    cfg = Config.fromfile(path)
    mean, std, size, padding = PREPROCESSING[data]
    preprocessor = cfg.data_preprocessor
    assert (preprocessor.mean, preprocessor.std) == (mean, std)
    assert preprocessor.num_classes == DATA[data][2]
    assert not preprocessor.get('to_rgb', False)  # the files are not BGR
    crop, flip, *rest = cfg.train_dataloader.dataset.pipeline
    assert crop == dict(type='RandomCrop', crop_size=size, padding=padding)
    assert flip == dict(type='RandomFlip', prob=0.5, direction='horizontal')
    assert rest == cfg.test_dataloader.dataset.pipeline == [dict(type='PackInputs')]
    assert cfg.val_dataloader == cfg.test_dataloader
    datasets = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert [dataset.split for dataset in datasets] == ['train', 'test']


@pytest.mark.skipif(not REAL_IMAGES.is_file(), reason='dataset-fashion-mnist is not installed')
def test_normalisation_of_the_real_fashion_mnist():
    header = 16
    pixels = np.frombuffer(gzip.decompress(REAL_IMAGES.read_bytes())[header:], np.uint8)
    assert pixels.size == 60_000 * 28 * 28
    mean, std, *_ = PREPROCESSING['fashion_mnist']
    assert [pixels.mean(), pixels.std()] == pytest.approx([*mean, *std], abs=0.005)


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda path: path.stem)
def test_schedule(path):
    """The paper's; for Fashion-MNIST a sixth as long; and a modern one for comparison."""
    cfg = Config.fromfile(path)
    optimizer, schedule = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    shortening = 6 if path.stem.endswith('fashion_mnist') else 1
    assert cfg.train_cfg.max_epochs == 180 / shortening
    if '_sgd_' not in path.stem:
        assert optimizer == dict(type='Adam', lr=1e-3)
        milestones = [round(epoch / shortening) for epoch in (100, 150)]
        assert schedule == dict(type='MultiStepLR', by_epoch=True, milestones=milestones, gamma=0.1)
        return
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert optimizer == dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    by_iteration = dict(by_epoch=True, convert_to_iter_based=True)
    assert schedule == [
        dict(type='LinearLR', start_factor=0.01, begin=0, end=5, **by_iteration),
        dict(type='CosineAnnealingLR', begin=5, end=180, **by_iteration),
    ]


def test_one_line_swaps_the_balancing():
    soft, hard = (
        (CONFIGS / f'resnet18_moe_{kind}_cifar100.py').read_text().splitlines()[2:]
        for kind in ('soft', 'hard')
    )
    different = [(a.strip(), b.strip()) for a, b in zip(soft, hard, strict=True) if a != b]
    assert different == [
        (
            "'./_base_/balancing/soft_importance.py',",
            "'./_base_/balancing/hard_relative_classification.py',",
        )
    ]


@pytest.mark.sweep(keep=1 / 2)
@pytest.mark.parametrize('position', range(5))
@pytest.mark.parametrize('num_experts', [4, 10])
def test_position_and_number_of_experts_in_one_line_each(position, num_experts, tmp_path):
    """The stage that is asked for, at the dense one's active cost; k first convolutions cost k."""
    source = (CONFIGS / 'resnet18_moe_soft_cifar100.py').read_text()
    for line, new in (
        ('moe_stages=4,', f'moe_stages={position},'),
        ('num_experts=4,', f'num_experts={num_experts},'),
    ):
        assert source.count(line) == 1
        source = source.replace(line, new)
    path = tmp_path / 'edited.py'
    path.write_text(source.replace("'./", f"'{CONFIGS}/"))
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    ((name, layer),) = moe.find_moe_layers(model).items()
    assert name == ('backbone.conv1' if position == 0 else f'backbone.layer{position}')
    assert layer.num_experts == num_experts
    dense = MODELS.build(Config.fromfile(CONFIGS / 'resnet18_moe_dense_cifar100.py').model)
    x = torch.randn(1, layer.router.in_channels, 16, 16)
    cost = count_flops(layer, x) / count_flops(dense.get_submodule(name), x)
    assert cost == (pytest.approx(2, rel=1e-3) if position == 0 else pytest.approx(1, abs=0.05))


@pytest.fixture
def write_data(tmp_path, monkeypatch):
    """Data in the published formats, of a size for a test, accepted as the published ones."""

    def write(num_test):
        folder = miniature.write_cifar100(tmp_path / 'cifar100', num_train=20, num_test=num_test)
        miniature.expect_cifar(monkeypatch, folder)
        miniature.write_fashion_mnist(tmp_path / 'fashion_mnist', num_train=50, num_test=num_test)
        return tmp_path

    return write


@pytest.mark.usefixtures('quick_analysis')
@pytest.mark.sweep(keep=1 / 2)
@pytest.mark.parametrize(
    'name',
    [
        'resnet18_moe_soft_cifar100',
        'resnet18_moe_hard_mean_cifar100',
        'resnet18_moe_soft_sgd_cifar100',
        'resnet18_moe_hard_fashion_mnist',
        'resnet18_mumoe_cifar100',
        'mlp_mixer_mumoe_fashion_mnist',
    ],
)
def test_config_trains(name, write_data, monkeypatch):
    """Nothing is changed but the data root, and 180 epochs to one; analysed, an eighth as wide."""
    analysed = name == 'resnet18_moe_soft_cifar100'
    num_test = 100 if analysed else 20
    folders = write_data(num_test)
    monkeypatch.chdir(folders)
    root = folders / next(data for data in DATA if name.endswith(data))
    options = [f'data_root={root}', 'train_cfg.max_epochs=1']
    if analysed:
        widths = ('backbone.stem_channels=8', 'backbone.base_channels=8', 'head.in_channels=64')
        options += [f'model.{width}' for width in widths]
    path = str(CONFIGS / f'{name}.py')
    cli.run_train([path, '--work-dir', 'run', '--cfg-options', *options])
    trained = torch.load('run/epoch_1.pth', map_location='cpu', weights_only=False)['state_dict']
    assert all(torch.isfinite(value.float()).all() for value in trained.values())
    if '_mumoe_' in name:
        assert all(value.any() for key, value in trained.items() if '.gate.weights.0' in key)
        return
    report = json.loads(Path('run/expert_utilization_val.json').read_text())
    assert report['layers']['backbone.layer4']['num_items'] == num_test
    if not analysed:
        return
    run_analysis([path, 'run/epoch_1.pth', '--cfg-options', *options, '--out', 'experts'])
    experts = json.loads(Path('experts/experts.json').read_text())
    associations = experts['layers']['backbone.layer4']['associations']['objects']
    assert len(associations['class']['bins']) == 100
    assert len(associations['superclass']['bins']) == 20
    # The miniature has every class once: the 5 of a group together.
    counts = torch.tensor(associations['superclass']['counts'])
    torch.testing.assert_close(counts.sum(1), torch.full((20,), 5.0, dtype=counts.dtype))
    kinds = {entry['kind'] for entry in experts['interventions']}
    assert kinds == {'only', 'equal', 'without', 'random', 'zeroed'}
