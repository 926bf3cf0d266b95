"""The parts of the model against each other, and against the classes and images of the data."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from mmdet_moe.engine.preflight.datasets import Dataset, class_of, classes_of, quote
from mmdet_moe.errors import ConfigError

_CLASSIFIER = 'mmpretrain.models.classifiers.image.ImageClassifier'
_PREPROCESSOR = 'mmpretrain.models.utils.data_preprocessor.ClsDataPreprocessor'
_NECK = 'mmpretrain.models.necks.gap.GlobalAveragePooling'
_HEADS = (
    'mmpretrain.models.heads.linear_head.LinearClsHead',
    'mmdet_moe.models.presets.mumoe_cls_head',
)
# Stage i, counted from 0, gives base_channels * expansion * 2 ** i channels.
_RESNETS = (
    'mmpretrain.models.backbones.resnet.ResNet',
    'mmpretrain.models.backbones.resnet.ResNetV1c',
    'mmpretrain.models.backbones.resnet.ResNetV1d',
    'mmpretrain.models.backbones.resnet_cifar.ResNet_CIFAR',
    'mmdet_moe.models.presets.moe_resnet',
    'mmdet_moe.models.backbones.moe_resnet_cifar.MoEResNet_CIFAR',
)
# Keeps what a part takes and gives.
_WITH_EXPERTS = 'mmdet_moe.models.with_experts.with_experts'
_EXPANSIONS = {18: 1, 34: 1, 50: 4, 101: 4, 152: 4}


def _models(model: Mapping[str, Any], field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The model, and those that it wraps."""
    # Semi-supervised and test-time augmented detectors, and mixtures of classifiers.
    for wrapper in ('detector', 'module', 'expert'):
        if isinstance(model.get(wrapper), Mapping):
            yield from _models(model[wrapper], f'{field}.{wrapper}')
    yield field, model


def _heads(model: Mapping[str, Any], field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a detector or classifier that have one output per class of the data set."""
    owners = []
    for owner_field, owner in _models(model, field):
        owners.append((owner_field, owner))
        if isinstance(owner.get('roi_head'), Mapping):
            owners.append((f'{owner_field}.roi_head', owner['roi_head']))
    for owner_field, owner in owners:
        for key in ('bbox_head', 'mask_head', 'head'):  # the last is a classifier's
            head = owner.get(key)
            several = head if isinstance(head, (list, tuple)) else [head]
            for index, item in enumerate(several):
                suffix = f'[{index}]' if item is not head else ''
                if isinstance(item, Mapping):
                    yield f'{owner_field}.{key}{suffix}', item


def check_num_classes(model: Any, dataset: Dataset) -> None:
    """Complain about a head of the model that has more or fewer outputs than there are classes.

    Raises:
        ConfigError: its ``num_classes`` is not the data set's number of classes.
    """
    classes = dataset.new_classes or classes_of(dataset)
    if classes is None or not isinstance(model, Mapping):
        return
    for field, head in _heads(model, 'model'):
        num_classes = head.get('num_classes')
        if num_classes is not None and num_classes != len(classes):
            raise ConfigError(
                f'{field}.num_classes is {num_classes}, but {dataset.field} has {len(classes)} '
                f'classes ({quote(classes)}): set {field}.num_classes={len(classes)}'
            )


def check_widths(cfg: Config, grey: Dataset | None = None) -> None:
    """Complain about a classifier whose parts have different numbers of channels.

    PyTorch only says in the first iteration that the shapes of two matrices do not fit. Parts that
    are not known here are left alone, for they may do anything with the channels.

    Args:
        cfg: The whole config.
        grey: A data set whose images have one channel, to compare with, too.

    Raises:
        ConfigError: ``in_channels`` of the backbone or head is not what the part gets.
    """
    model = cfg.get('model')
    for field, part in _models(model, 'model') if isinstance(model, Mapping) else ():
        backbone = part.get('backbone')
        if _name(cfg, part) == _CLASSIFIER and _name(cfg, backbone) in _RESNETS:
            _check_images(cfg, backbone, f'{field}.backbone', grey)
            _check_features(cfg, part, field)


def _name(cfg: Config, part: Any) -> str | None:
    """The full name of what makes a part of the model, without experts; None if unknown."""
    if not isinstance(part, Mapping):
        return None
    for key in ('type', 'of'):
        cls = class_of(cfg, part.get(key), MODELS)
        name = f'{cls.__module__}.{cls.__name__}' if cls is not None else None
        if name != _WITH_EXPERTS:
            break
    return name


def _check_images(
    cfg: Config, backbone: Mapping[str, Any], field: str, grey: Dataset | None
) -> None:
    own = 'data_preprocessor' in cfg.model
    preprocessor = (cfg.model if own else cfg).get('data_preprocessor') or {}
    mean = preprocessor.get('mean') or ()
    known = _name(cfg, {'type': 'ClsDataPreprocessor', **preprocessor}) == _PREPROCESSOR
    if not known or not isinstance(mean, (list, tuple)):
        return
    in_channels, num_means = backbone.get('in_channels', 3), len(mean)
    # A single mean is also right for images of several channels, several ones are not for one.
    if num_means > 1 and in_channels != num_means:
        raise ConfigError(
            f'{field}.in_channels is {in_channels}, but {"model." * own}data_preprocessor.mean has '
            f'{num_means} values: set {field}.in_channels={num_means}, or mean and std to one '
            'value each for grey images'
        )
    if grey is not None and num_means <= 1 and in_channels != 1:
        raise ConfigError(
            f'{field}.in_channels is {in_channels}, but the images of {grey.field} are grey: set '
            f'{field}.in_channels=1'
        )


def _check_features(cfg: Config, classifier: Mapping[str, Any], field: str) -> None:
    head, neck = classifier.get('head'), classifier.get('neck')
    if _name(cfg, head) not in _HEADS or _name(cfg, neck) != _NECK or neck.get('dim', 2) != 2:
        return
    found, given = head.get('in_channels'), _resnet_channels(classifier['backbone'])
    if None not in (found, given) and found != given:
        raise ConfigError(
            f'{field}.head.in_channels is {found}, but {field}.backbone gives {given} channels '
            f'with depth={classifier["backbone"]["depth"]}: set {field}.head.in_channels={given}'
        )


def _resnet_channels(backbone: Mapping[str, Any]) -> int | None:
    """Channels of the last output of a ResNet; None for options that its constructor refuses."""
    base, expansion = backbone.get('base_channels', 64), backbone.get('expansion')
    expansion = expansion or _EXPANSIONS.get(backbone.get('depth'))
    stages = backbone.get('out_indices', (3,))
    if not isinstance(stages, (list, tuple)) or not stages:
        return None
    if not all(type(value) is int for value in (base, expansion, *stages)) or min(stages) < 0:
        return None
    return base * expansion * 2 ** max(stages)
