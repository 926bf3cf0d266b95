"""Parts of a classifier that do not fit each other or the images, against models that are built."""

import copy

import pytest
import torch
from miniature import write_fashion_mnist
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS, complaint

from mmdet_moe.cli import load_config
from mmdet_moe.engine.preflight import check_config

MODEL = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[0.0] * 3, std=[1.0] * 3),
    backbone=dict(type='ResNet_CIFAR', depth=18),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=512),
)


def config(**changes):
    """A classifier without data, with ``part__field=value`` changed."""
    model = copy.deepcopy(MODEL)
    for name, value in changes.items():
        part, _, field = name.partition('__')
        model[part][field] = value
    return Config(dict(default_scope='mmpretrain', model=model))


RESNETS = (
    ('ResNet', {}),
    ('ResNetV1c', {'out_indices': (1, 2)}),
    ('ResNetV1d', {'num_stages': 2, 'strides': (1, 2), 'dilations': (1, 1), 'out_indices': (1,)}),
    ('ResNet_CIFAR', {}),
    ('mmdet_moe.MoEResNet', {}),
    ('mmdet_moe.MoEResNet', {'out_indices': (0, 1, 2)}),
    ('mmdet_moe.MoEResNet_CIFAR', {'expert_channels': 4}),
)


@pytest.mark.parametrize(
    ('type_', 'depth', 'options'),
    [
        *((type_, depth, options) for type_, options in RESNETS for depth in (18, 34, 50)),
        ('mmdet_moe.WithExperts', 18, {'of': 'ResNet', 'experts': [{'at': 'layer4'}]}),
        ('ResNet', 50, {'expansion': 2}),
    ],
)
def test_channels_of_the_backbone(type_, depth, options):
    backbone = dict(type=type_, depth=depth, base_channels=8, **options)
    cfg = config(head__in_channels=7)
    cfg.model.backbone = backbone
    init_default_scope('mmpretrain')
    given = MODELS.build(backbone)(torch.randn(2, 3, 64, 64))[-1].shape[1]
    message = complaint(cfg)
    assert message == (
        f'model.head.in_channels is 7, but model.backbone gives {given} channels with '
        f'depth={depth}: set model.head.in_channels={given}'
    )
    cfg.merge_from_dict({'model.head.in_channels': given})
    check_config(cfg)


def test_parts_of_a_wrapped_classifier():
    cfg = config(backbone__depth=50)
    expert = cfg.model.to_dict() | dict(data_preprocessor=dict(mean=[0.0]))  # is not used
    preprocessor = cfg.model.data_preprocessor
    cfg.model = dict(type='mmdet_moe.ClassifierMixture', expert=expert)
    cfg.data_preprocessor = preprocessor
    assert complaint(cfg).endswith(': set model.expert.head.in_channels=2048')
    cfg.model.expert.backbone.update(depth=18, in_channels=1)
    message = complaint(cfg)
    assert 'model.expert.backbone.in_channels is 1, but data_preprocessor.mean has 3' in message


def test_channels_of_the_mean():
    assert complaint(config(backbone__in_channels=1)) == (
        'model.backbone.in_channels is 1, but model.data_preprocessor.mean has 3 values: set '
        'model.backbone.in_channels=3, or mean and std to one value each for grey images'
    )
    check_config(config(backbone__in_channels=4, data_preprocessor__mean=None))
    check_config(config(data_preprocessor__mean=[127.5]))  # one for all three


@pytest.mark.parametrize(
    'changes',
    [
        dict(backbone__type='ResNeSt'),
        dict(backbone__type='NoSuchBackbone'),
        dict(backbone__type='mmdet_moe.NoSuchBackbone'),
        dict(backbone__depth=19),
        dict(backbone__base_channels='many'),
        dict(backbone__out_indices=3),
        dict(neck__type='GeneralizedMeanPooling'),
        dict(neck__dim=1),
        dict(head__type='StackedLinearClsHead'),
        dict(data_preprocessor__type='No', backbone__in_channels=1, head__in_channels=512),
    ],
)
def test_what_is_not_known_is_left_alone(changes):
    check_config(config(**{'head__in_channels': 7} | changes))


def test_grey_images(tmp_path):
    root = write_fashion_mnist(tmp_path)

    def fashion_mnist(*pipeline, **changes):
        cfg = config(data_preprocessor__mean=[127.5], data_preprocessor__std=[64.0], **changes)
        dataset = dict(type='FashionMNIST', data_root=str(root), split='train', download=False)
        dataset['pipeline'] = [*pipeline, dict(type='PackInputs')]
        cfg.train_dataloader = dict(dataset=dataset)
        return cfg

    crop = dict(type='RandomCrop', crop_size=28)
    assert complaint(fashion_mnist(crop)) == (
        'model.backbone.in_channels is 3, but the images of train_dataloader.dataset are grey: '
        'set model.backbone.in_channels=1'
    )
    check_config(fashion_mnist(crop, backbone__in_channels=1))
    check_config(fashion_mnist(dict(type='torchvision/Grayscale', num_output_channels=3)))
    cfg = fashion_mnist(crop)
    cfg.model.data_preprocessor.update(mean=[0.0] * 3, std=[1.0] * 3)  # makes three channels of one
    check_config(cfg)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_configs_pass(path, tmp_path, monkeypatch):
    """Without the data, which are not there."""
    torch.save({}, tmp_path / 'lite0.pth')
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / 'lite0.pth'))
    cfg = load_config(str(path))
    for loader in ('train_dataloader', 'val_dataloader'):
        cfg[loader] = None
    cfg.load_from = None
    check_config(cfg)
    if path.stem.startswith('resnet18_'):
        cfg.model.backbone.depth = 50
        assert complaint(cfg).endswith(': set model.head.in_channels=2048')
