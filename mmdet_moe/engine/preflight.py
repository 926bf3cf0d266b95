"""Checks of a config against the disk before anything is built.

A wrong path or class list otherwise shows up minutes later, deep in a toolbox, or never:
MMDetection ignores class names that an annotation file does not have. Every complaint is one
:class:`~mmdet_moe.errors.ConfigError` sentence with the config's field and the fix.
"""

import gc
import inspect
import json
import os.path as osp
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmdet_moe.errors import ConfigError

__all__ = ['check_checkpoint', 'check_config']

_LOADERS = {
    'train': (('train_dataloader', None), ('val_dataloader', 'val_evaluator')),
    'val': (('val_dataloader', 'val_evaluator'),),
    'test': (('test_dataloader', 'test_evaluator'),),
}
_IMAGES_TO_LOOK_AT = 5
_NAMES_TO_PRINT = 5
_GET_DATA = (
    'prepare the data set with `tools/prepare_data.py`, or say where it is with '
    '`--cfg-options data_root=DIR` or an environment variable (COCO_ROOT for COCO, '
    'DIGIT_SCENES_ROOT for digit scenes)'
)


@dataclass(frozen=True)
class _CocoFile:
    """What the checks need of an annotation file."""

    categories: tuple[str, ...]
    first_images: tuple[str, ...]
    num_images: int
    has_annotations: bool


@dataclass(frozen=True)
class _Dataset:
    """A data set's config with the name of its field, wrappers taken off."""

    field: str
    cfg: Mapping[str, Any]
    cls: type | None

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
        return backend in ('local', 'disk') and not _is_remote(self.cfg.get('data_root') or '')


def check_config(cfg: Config, mode: str = 'train', checkpoint: str | None = None) -> None:
    """Compare a config with the files that it names.

    Args:
        cfg: the whole config.
        mode: ``'train'`` (training and validation data), ``'val'`` or ``'test'``.
        checkpoint: the checkpoint of the command line, if any.

    Raises:
        ConfigError: the first thing that is wrong, in one sentence.
    """
    _check_hooks(cfg)
    if checkpoint is not None:
        check_checkpoint(checkpoint, 'checkpoint')
    elif cfg.get('load_from'):
        check_checkpoint(cfg.load_from, 'load_from')
    if mode == 'train':
        _check_pretrained(cfg.get('model'), 'model')
    coco_files: dict[str, _CocoFile] = {}
    for loader_field, evaluator_field in _LOADERS[mode]:
        if cfg.get(loader_field) is None:
            continue
        _check_loader(cfg, loader_field, evaluator_field, coco_files)


def check_checkpoint(path: str, field: str) -> None:
    """Complain about a local checkpoint that is missing or no checkpoint.

    Addresses (``https://``, ``torchvision://``, ...) are left to MMEngine.

    Args:
        path: file or address.
        field: what to call it in the message.

    Raises:
        ConfigError: the file does not exist or was not written by PyTorch.
    """
    if _is_remote(path):
        return
    if not osp.isfile(path):
        fix = 'give the path of an existing checkpoint'
        if field == 'load_from':
            fix = 'train that model first, or choose with --cfg-options load_from=FILE (or None)'
        raise ConfigError(f"{field}: there is no file '{path}'; {fix}")
    # PyTorch writes zip archives since 1.6, and wrote bare pickles (first byte 0x80) before.
    with open(path, 'rb') as file:
        is_pickle = file.read(1) == b'\x80'
    if not (is_pickle or zipfile.is_zipfile(path)):
        raise ConfigError(
            f"{field}: '{path}' is not a PyTorch checkpoint, or an incomplete one; copy or "
            'download it again'
        )


def _is_remote(path: str) -> bool:
    return '://' in path


def _check_hooks(cfg: Config) -> None:
    hooks = cfg.get('custom_hooks')
    if hooks is not None and not (isinstance(hooks, Sequence) and not isinstance(hooks, str)):
        raise ConfigError(
            f'custom_hooks must be a list of dicts such as [dict(type=...)], got {hooks!r}'
        )
    for index, hook in enumerate(hooks or ()):
        if isinstance(hook, str) or (isinstance(hook, Mapping) and 'type' not in hook):
            raise ConfigError(
                f'custom_hooks[{index}] must be a dict with the key `type`, got {hook!r}'
            )
    default_hooks = cfg.get('default_hooks')
    if default_hooks is not None and not isinstance(default_hooks, Mapping):
        raise ConfigError(
            'default_hooks must be a dict of dicts such as dict(timer=dict(type=...)); further '
            'hooks belong into the list custom_hooks'
        )


def _check_pretrained(node: Any, field: str) -> None:
    """Look for local checkpoints in the ``init_cfg`` of the model and its parts."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            _check_pretrained(item, f'{field}[{index}]')
    elif isinstance(node, Mapping):
        for key, value in node.items():
            name = f'{field}.{key}'
            if key == 'init_cfg' and isinstance(value, Mapping):
                pretrained = value.get('checkpoint')
                if value.get('type') == 'Pretrained' and isinstance(pretrained, str):
                    check_checkpoint(pretrained, f'{name}.checkpoint')
            else:
                _check_pretrained(value, name)


def _check_loader(
    cfg: Config, loader_field: str, evaluator_field: str | None, coco_files: dict[str, _CocoFile]
) -> None:
    evaluators = list(_evaluators(cfg, evaluator_field))
    # A test split without ground truth is fine as long as results are only written, not scored.
    needs_annotations = not evaluators or not all(
        evaluator.get('format_only') for _, evaluator in evaluators
    )
    dataset_cfg = cfg[loader_field].get('dataset')
    for dataset in _datasets(cfg, dataset_cfg, f'{loader_field}.dataset'):
        if not dataset.is_local or dataset.downloads:
            continue
        _check_paths(dataset)
        if _reads_coco(dataset.cls):
            _check_coco(dataset, needs_annotations, coco_files)
            _check_num_classes(cfg.get('model'), dataset)
    for field, evaluator in evaluators:
        ann_file = evaluator.get('ann_file')
        if isinstance(ann_file, str) and not _is_remote(ann_file) and not osp.isfile(ann_file):
            raise ConfigError(f"{field}.ann_file: there is no file '{ann_file}'; {_GET_DATA}")


def _evaluators(cfg: Config, field: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    evaluator = cfg.get(field) if field else None
    if isinstance(evaluator, Mapping):
        yield field, evaluator
    elif isinstance(evaluator, Sequence):
        for index, item in enumerate(evaluator):
            if isinstance(item, Mapping):
                yield f'{field}[{index}]', item


def _datasets(cfg: Config, node: Any, field: str) -> Iterator[_Dataset]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if not isinstance(node, Mapping):
        return  # an object that somebody built already
    if 'dataset' in node:
        yield from _datasets(cfg, node['dataset'], f'{field}.dataset')
    elif 'datasets' in node:
        for index, item in enumerate(node['datasets']):
            yield from _datasets(cfg, item, f'{field}.datasets[{index}]')
    else:
        yield _Dataset(field, node, _dataset_class(cfg, node.get('type')))


def _dataset_class(cfg: Config, type_: Any) -> type | None:
    """The class behind a config's ``type``; None for an unknown name, which the builder reports."""
    if not isinstance(type_, str):
        return type_ if inspect.isclass(type_) else None
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        try:
            with DATASETS.switch_scope_and_registry(None) as registry:
                found = registry.get(type_)
        except RuntimeError:  # MMEngine's answer to an unknown name with a dot
            return None
    return found if inspect.isclass(found) else None


def _check_paths(dataset: _Dataset) -> None:
    data_root = dataset.cfg.get('data_root')
    if data_root and not osp.isdir(data_root):
        raise ConfigError(
            f"{dataset.field}.data_root: there is no folder '{data_root}'; {_GET_DATA}"
        )
    ann_file = dataset.cfg.get('ann_file')
    if isinstance(ann_file, str) and ann_file and not _is_remote(ann_file):
        path = dataset.path(ann_file)
        # An mmpretrain data set may take a folder here.
        if not osp.exists(path):
            raise ConfigError(f"{dataset.field}.ann_file: there is no file '{path}'; {_GET_DATA}")
    for key, folder in _prefixes(dataset.cfg).items():
        if folder and not _is_remote(folder) and not osp.isdir(dataset.path(folder)):
            raise ConfigError(
                f'{dataset.field}.data_prefix{key}: there is no folder '
                f"'{dataset.path(folder)}'; {_GET_DATA}"
            )


def _prefixes(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Folders of ``data_prefix`` by the key to print."""
    prefix = cfg.get('data_prefix') or {}
    if isinstance(prefix, str):
        return {'': prefix}
    return {f'.{key}': value for key, value in prefix.items() if isinstance(value, str)}


def _reads_coco(cls: type | None) -> bool:
    """Whether a data set reads plain COCO detection JSON (LVIS and panoptic ones differ)."""
    for base in getattr(cls, '__mro__', ()):
        if (base.__module__, base.__name__) == ('mmdet.datasets.coco', 'CocoDataset'):
            return (
                cls.load_data_list is base.load_data_list
                and cls.parse_data_info is base.parse_data_info
            )
    return False


def _check_coco(
    dataset: _Dataset, needs_annotations: bool, coco_files: dict[str, _CocoFile]
) -> None:
    field = f'{dataset.field}.ann_file'
    path = dataset.path(dataset.cfg.get('ann_file') or '')
    if path not in coco_files:
        coco_files[path] = _read_coco(path, field)
    coco = coco_files[path]
    if needs_annotations and not coco.has_annotations:
        raise ConfigError(
            f"{field}: '{path}' is not a COCO annotation file, it has no `annotations`"
        )
    if coco.num_images == 0:
        raise ConfigError(f"{field}: '{path}' lists no images")
    _check_classes(dataset, coco, path)
    _check_images(dataset, coco)


def _read_coco(path: str, field: str) -> _CocoFile:
    if not osp.isfile(path):
        raise ConfigError(f"{field}: there is no file '{path}'; {_GET_DATA}")
    # The files have up to millions of small dicts, over which the collector would run for seconds.
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{field}: '{path}' is not JSON, or an incomplete copy of it ({error})"
        ) from error
    finally:
        if gc_was_on:
            gc.enable()
    for key in ('images', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ConfigError(f"{field}: '{path}' is not a COCO annotation file, it has no `{key}`")
    images = content['images']
    return _CocoFile(
        categories=tuple(str(category.get('name')) for category in content['categories']),
        first_images=tuple(
            image['file_name'] for image in images[:_IMAGES_TO_LOOK_AT] if 'file_name' in image
        ),
        num_images=len(images),
        has_annotations=isinstance(content.get('annotations'), list),
    )


def _classes(dataset: _Dataset) -> tuple[str, ...] | None:
    """Class names of a data set: its ``metainfo`` in the config, or else its class's own."""
    metainfo = {
        **(getattr(dataset.cls, 'METAINFO', None) or {}),
        **(dataset.cfg.get('metainfo') or {}),
    }
    classes = metainfo.get('classes')
    if isinstance(classes, str):
        if not osp.isfile(classes):
            raise ConfigError(
                f'{dataset.field}.metainfo.classes must be a list or tuple of names, or a text '
                f'file with one name a line, got {classes!r}; write one class as ({classes!r},)'
            )
        classes = Path(classes).read_text(encoding='utf-8').splitlines()
    return tuple(classes) if classes is not None else None


def _quote(names: Sequence[str]) -> str:
    shown = ', '.join(repr(name) for name in names[:_NAMES_TO_PRINT])
    more = len(names) - _NAMES_TO_PRINT
    return f'{shown} and {more} more' if more > 0 else shown


def _check_classes(dataset: _Dataset, coco: _CocoFile, path: str) -> None:
    classes = _classes(dataset)
    if classes is None:
        return
    field = f'{dataset.field}.metainfo.classes'
    known = set(coco.categories)
    missing = [name for name in classes if name not in known]
    if missing:
        raise ConfigError(
            f"{field}: {_quote(missing)} not among the categories of '{path}', which has "
            f'{_quote(coco.categories)}; set it to the names of that file'
        )
    # MMDetection numbers the classes in the file's order and takes their names from the config.
    wanted = set(classes)
    in_file_order = tuple(name for name in coco.categories if name in wanted)
    if in_file_order != classes:
        raise ConfigError(
            f"{field} must be in the order of the categories of '{path}', {_quote(in_file_order)}, "
            f'got {_quote(classes)}'
        )


def _check_images(dataset: _Dataset, coco: _CocoFile) -> None:
    prefix = dataset.cfg.get('data_prefix') or {}
    folder = dataset.path(prefix.get('img', '') if isinstance(prefix, Mapping) else prefix)
    paths = [osp.join(folder, name) for name in coco.first_images]
    found = [path for path in paths if osp.isfile(path)]
    field = f'{dataset.field}.data_prefix.img'
    if paths and not found:
        raise ConfigError(
            f"{field}: none of the first {len(paths)} images of '{dataset.cfg.get('ann_file')}' "
            f"exists, for example '{paths[0]}'; {_GET_DATA}"
        )
    for path in found:
        if osp.getsize(path) == 0:
            raise ConfigError(f"{field}: the image '{path}' is an empty file; copy it again")


def _heads(model: Mapping[str, Any], field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a detector that have one output per class of the data set."""
    for wrapper in ('detector', 'module'):  # semi-supervised and test-time augmented detectors
        if isinstance(model.get(wrapper), Mapping):
            yield from _heads(model[wrapper], f'{field}.{wrapper}')
    owners = [(field, model)]
    if isinstance(model.get('roi_head'), Mapping):
        owners.append((f'{field}.roi_head', model['roi_head']))
    for owner_field, owner in owners:
        for key in ('bbox_head', 'mask_head'):
            head = owner.get(key)
            several = head if isinstance(head, (list, tuple)) else [head]
            for index, item in enumerate(several):
                suffix = f'[{index}]' if item is not head else ''
                if isinstance(item, Mapping):
                    yield f'{owner_field}.{key}{suffix}', item


def _check_num_classes(model: Any, dataset: _Dataset) -> None:
    classes = _classes(dataset)
    if classes is None or not isinstance(model, Mapping):
        return
    for field, head in _heads(model, 'model'):
        num_classes = head.get('num_classes')
        if num_classes is not None and num_classes != len(classes):
            raise ConfigError(
                f'{field}.num_classes is {num_classes}, but {dataset.field} has {len(classes)} '
                f'classes ({_quote(classes)}): set {field}.num_classes={len(classes)}'
            )
