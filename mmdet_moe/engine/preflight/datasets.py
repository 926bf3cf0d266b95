"""What a config's data sets are: their classes, their files and their class names."""

import inspect
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, DefaultScope, Registry

from mmdet_moe.compat.distributed import note
from mmdet_moe.datasets.joint import joint_classes
from mmdet_moe.errors import ConfigError

GET_DATA = (
    'prepare the data set with `tools/prepare_data.py`, or say where it is with '
    '`--cfg-options data_root=DIR` or an environment variable (COCO_ROOT for COCO, '
    'VOC2007_ROOT for VOC2007, DIGIT_SCENES_ROOT for digit scenes, FASHION_SCENES_ROOT for those '
    'with clothes)'
)
_NAMES_TO_PRINT = 5


@dataclass(frozen=True)
class Dataset:
    """A data set's config with the name of its field, wrappers taken off.

    Attributes:
        field: Where the config stands.
        cfg: The config.
        cls: The class behind its ``type``; None if unknown.
        new_classes: Names of the classes of the outermost wrapper that replaces the labels; None
            without such a wrapper.
    """

    field: str
    cfg: Mapping[str, Any]
    cls: type | None
    new_classes: tuple[str, ...] | None = None

    def path(self, relative: str) -> str:
        """``relative`` below the data set's root, the way MMEngine joins them."""
        return osp.join(self.cfg.get('data_root') or '', relative)

    @property
    def downloads(self) -> bool:
        """Whether missing files are fetched, which for some data sets is the default."""
        for cls in getattr(self.cls, '__mro__', ()):
            parameter = inspect.signature(cls.__init__).parameters.get('download')
            if parameter is not None:
                return bool(self.cfg.get('download', parameter.default))
        return False

    @property
    def is_local(self) -> bool:
        """Whether ordinary files hold the data."""
        backend = (self.cfg.get('backend_args') or {}).get('backend', 'local')
        return backend in ('local', 'disk') and not is_remote(self.cfg.get('data_root') or '')


def is_remote(path: str) -> bool:
    """Whether a path is an address such as ``s3://bucket/folder``."""
    return '://' in path


def datasets_of(
    cfg: Config, node: Any, field: str, new_classes: tuple[str, ...] | None = None
) -> Iterator[Dataset]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset.

    Args:
        cfg: The whole config.
        node: The config of a data set.
        field: Where it stands.
        new_classes: As of :class:`Dataset`, of the wrappers around it.
    """
    if not isinstance(node, Mapping):
        return  # an object that somebody built already
    cls = class_of(cfg, node.get('type'))
    if 'dataset' in node:
        if new_classes is None:
            new_classes = (getattr(cls, 'METAINFO', None) or {}).get('classes')
        yield from datasets_of(cfg, node['dataset'], f'{field}.dataset', new_classes)
    elif 'datasets' in node:
        parts = [
            list(datasets_of(cfg, item, f'{field}.datasets[{index}]', new_classes))
            for index, item in enumerate(node['datasets'])
        ]
        found = [dataset for part in parts for dataset in part]
        if new_classes is None and getattr(cls, 'joins_classes', False):
            joined = joint_classes([d.new_classes or classes_of(d) or () for d in found])
            found = [replace(dataset, new_classes=joined) for dataset in found]
        yield from found
    else:
        yield Dataset(field, node, cls, new_classes)


def class_of(cfg: Config, type_: Any, registry: Registry = DATASETS) -> Any:
    """The class, or function, behind a config's ``type``; None for an unknown name, which the
    builder reports."""
    if not isinstance(type_, str):
        return type_ if callable(type_) else None
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        try:
            with registry.switch_scope_and_registry(None) as of_scope:
                found = of_scope.get(type_)
        except RuntimeError:  # MMEngine's answer to an unknown name with a dot
            return None
    return found


def inherits(cls: type | None, module: str, name: str, *methods: str) -> bool:
    """Whether a class is or inherits one that is told by name, and has not replaced its methods.

    By name, so that no toolbox is imported that the config does not use.
    """
    for base in getattr(cls, '__mro__', ()):
        if (base.__module__, base.__name__) == (module, name):
            return all(getattr(cls, method) is getattr(base, method) for method in methods)
    return False


def classes_of(dataset: Dataset) -> tuple[str, ...] | None:
    """Class names of a data set as the toolboxes find them.

    ``metainfo`` in the config comes first, then MMPretrain's argument ``classes``, then what the
    data set's class says itself, then its folders.
    """
    for field, classes in (
        ('metainfo.classes', (dataset.cfg.get('metainfo') or {}).get('classes')),
        ('classes', dataset.cfg.get('classes')),
        ('METAINFO', (getattr(dataset.cls, 'METAINFO', None) or {}).get('classes')),
    ):
        if classes is not None:
            return _class_names(classes, f'{dataset.field}.{field}')
    return class_folders(dataset)


def image_folder(dataset: Dataset) -> str | None:
    """The folder whose folders MMPretrain takes for the classes; None of other data sets."""
    cfg, custom = dataset.cfg, ('mmpretrain.datasets.custom', 'CustomDataset')
    split = cfg.get('split') or ''  # of ImageNet, which may list the files of a split, too
    if (
        not inherits(dataset.cls, *custom, 'load_data_list', '_find_samples')
        or cfg.get('ann_file')
        or not cfg.get('with_label', True)
        or not dataset.is_local
        or split == 'test'
        or (split and osp.exists(dataset.path(f'meta/{split}.txt')))
    ):
        return None
    prefix = cfg.get('data_prefix') or split
    folder = dataset.path(prefix.get('img_path', '') if isinstance(prefix, Mapping) else prefix)
    return folder if osp.isdir(folder) else None


def class_folders(dataset: Dataset) -> tuple[str, ...] | None:
    """The folders that MMPretrain takes for the classes, in the order in which it numbers them."""
    folder = image_folder(dataset)
    return folder and tuple(sorted(list_dir_or_file(folder, list_file=False)))


def check_same_classes(
    classes: Sequence[str], field: str, trained: Sequence[str], where: str, fix: str
) -> None:
    """Complain about classes that have other numbers than those that a model learns.

    A model knows classes by their numbers alone, so that every figure would be wrong. Names none
    of which the other list has are another vocabulary, and only noted.

    Args:
        classes: Names of the data set's classes, in their order.
        field: Of the data set.
        trained: Names of the classes that the model's outputs stand for.
        where: What gives ``trained``.
        fix: How to mend it.

    Raises:
        ConfigError: The lists have a name in common, and differ.
    """
    if tuple(classes) == tuple(trained):
        return
    pairs = zip_longest(map(repr, classes), map(repr, trained), fillvalue='missing')
    number, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    first = f'class {number} is {here}, but {there} in {where}'
    if set(classes) & set(trained):
        raise ConfigError(f'{field}: {first}, and a model tells classes by their numbers: {fix}')
    note(f'{field}: {first}; they are compared by their numbers')


def check_trained_classes(
    checkpoint: Mapping[str, Any], metainfo: Mapping[str, Any] | None, field: str
) -> None:
    """:func:`check_same_classes` against those that a checkpoint was trained on, where it tells.

    Args:
        checkpoint: What it says of itself, its ``meta``.
        metainfo: Of the data set.
        field: Of the data set.

    Raises:
        ConfigError: The classes have other numbers.
    """
    trained = (checkpoint.get('dataset_meta') or {}).get('classes')
    classes = (metainfo or {}).get('classes')
    if trained and classes:
        fix = 'give the data set the classes of the training, in that order'
        check_same_classes(classes, field, trained, 'the training of the checkpoint', fix)


def _class_names(classes: str | Sequence[str], field: str) -> tuple[str, ...]:
    if not isinstance(classes, str):
        return tuple(classes)
    if not osp.isfile(classes):
        raise ConfigError(
            f'{field} must be a list or tuple of names, or a text file with one name a line, got '
            f'{classes!r}; write one class as ({classes!r},)'
        )
    return tuple(Path(classes).read_text(encoding='utf-8').splitlines())


def quote(names: Sequence[str]) -> str:
    """The first few names for a message."""
    shown = ', '.join(repr(name) for name in names[:_NAMES_TO_PRINT])
    more = len(names) - _NAMES_TO_PRINT
    return f'{shown} and {more} more' if more > 0 else shown
