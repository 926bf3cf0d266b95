"""The outputs of the model's heads against the classes of the data."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmdet_moe.engine.preflight.datasets import Dataset, classes_of, quote
from mmdet_moe.errors import ConfigError


def _heads(model: Mapping[str, Any], field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a detector or classifier that have one output per class of the data set."""
    # Semi-supervised and test-time augmented detectors, and mixtures of classifiers.
    for wrapper in ('detector', 'module', 'expert'):
        if isinstance(model.get(wrapper), Mapping):
            yield from _heads(model[wrapper], f'{field}.{wrapper}')
    owners = [(field, model)]
    if isinstance(model.get('roi_head'), Mapping):
        owners.append((f'{field}.roi_head', model['roi_head']))
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
