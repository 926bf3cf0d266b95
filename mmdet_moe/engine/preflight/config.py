"""The checks of a whole config, which walk its hooks, checkpoints and data loaders."""

import difflib
import inspect
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS, OPTIMIZERS
from torch.utils.data import DataLoader

from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.datasets.coco_file import CocoFile
from mmdet_moe.engine.preflight.arrays import check_arrays, is_grey, reads_arrays
from mmdet_moe.engine.preflight.checkpoints import check_checkpoint
from mmdet_moe.engine.preflight.coco import check_coco, check_coco_metric, reads_coco
from mmdet_moe.engine.preflight.datasets import (
    GET_DATA,
    Dataset,
    check_same_classes,
    class_folders,
    class_of,
    classes_of,
    datasets_of,
    image_folder,
    inherits,
    is_remote,
    quote,
)
from mmdet_moe.engine.preflight.heads import check_num_classes, check_widths
from mmdet_moe.engine.preflight.listed import check_listed
from mmdet_moe.errors import ConfigError

_LOADERS = {
    'train': (('train_dataloader', None), ('val_dataloader', 'val_evaluator')),
    'val': (('val_dataloader', 'val_evaluator'),),
    'test': (('test_dataloader', 'test_evaluator'),),
}

#: What a runner is given together, or not at all.
_PARTS = (
    ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    ('val_dataloader', 'val_cfg', 'val_evaluator'),
    ('test_dataloader', 'test_cfg', 'test_evaluator'),
)
#: Numbers that are compared, or divided by, long after they were read, and their least values.
_LEAST = {
    'train_cfg.max_iters': 1,
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
    'default_hooks.checkpoint.interval': -1,
    'optim_wrapper.accumulative_counts': 1,
    'optim_wrapper.optimizer.lr': 0,
    'train_dataloader.batch_size': 1,
    'val_dataloader.batch_size': 1,
    'test_dataloader.batch_size': 1,
}
#: Those of them that are divided by; MMEngine takes ``max_iters=9e4``, too.
_COUNTS = ('val_interval', 'accumulative_counts', 'batch_size')


@dataclass(frozen=True)
class _Seen:
    """What was read already, because data loaders share files."""

    coco_files: dict[str, CocoFile]
    good_files: set[tuple]
    trained: list[Dataset]


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
    _check_numbers(cfg)
    if checkpoint is not None:
        check_checkpoint(checkpoint, 'checkpoint')
    elif cfg.get('load_from'):
        check_checkpoint(cfg.load_from, 'load_from')
    if mode == 'train':
        _check_pretrained(cfg.get('model'), 'model')
    check_widths(cfg)
    seen = _Seen(coco_files={}, good_files=set(), trained=[])
    if mode != 'train' and cfg.get('train_dataloader'):
        dataset_cfg = cfg.train_dataloader.get('dataset')
        seen.trained.extend(datasets_of(cfg, dataset_cfg, 'train_dataloader.dataset'))
    for loader_field, evaluator_field in _LOADERS[mode]:
        if cfg.get(loader_field) is None:
            continue
        _check_loader(cfg, loader_field, evaluator_field, seen)


def check_runner(cfg: Config) -> None:
    """Complain about what MMEngine's runner wants together, and about an unknown optimizer.

    It looks the latter up when the model has been built.

    Args:
        cfg: the whole config, of which a runner will be built.

    Raises:
        ConfigError: Some are missing, or nothing has the optimizer's name.
    """
    for names in _PARTS:
        missing = [name for name in names if cfg.get(name) is None]
        if missing and len(missing) < len(names):
            given = next(name for name in names if name not in missing)
            raise ConfigError(
                f'{missing[0]}: the config has {given}, but not {" and ".join(missing)}; give all '
                f'of {", ".join(names)}, or none of them'
            )
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    type_ = optimizer.get('type') if isinstance(optimizer, Mapping) else None
    if isinstance(type_, str) and class_of(cfg, type_, OPTIMIZERS) is None:
        close = difflib.get_close_matches(type_, OPTIMIZERS.module_dict, n=1)
        raise ConfigError(
            f"optim_wrapper.optimizer.type: there is no optimizer '{type_}'; "
            + (f"did you mean '{close[0]}'?" if close else 'check its spelling and custom_imports')
        )


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


def _check_numbers(cfg: Config) -> None:
    for field, least in _LEAST.items():
        owner, _, name = field.rpartition('.')
        node: Any = cfg._cfg_dict
        for key in owner.split('.'):
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and node.get(name) is not None:
            check = check_integer if name in _COUNTS else check_number
            check(owner, name, node[name], least)


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


def _check_loader(cfg: Config, loader_field: str, evaluator_field: str | None, seen: _Seen) -> None:
    evaluators = list(_evaluators(cfg, evaluator_field))
    # A test split without ground truth is fine as long as results are only written, not scored.
    needs_annotations = not evaluators or not all(
        evaluator.get('format_only') for _, evaluator in evaluators
    )
    _check_fields(cfg[loader_field], loader_field)
    dataset_cfg = cfg[loader_field].get('dataset')
    datasets = list(datasets_of(cfg, dataset_cfg, f'{loader_field}.dataset'))
    for dataset in datasets:
        is_coco = reads_coco(dataset.cls)
        is_arrays = reads_arrays(dataset.cls)
        if is_arrays:
            check_arrays(dataset, seen.good_files)
        elif dataset.is_local and not dataset.downloads:
            _check_paths(dataset)
            check_listed(dataset)
            if is_coco:
                check_coco(dataset, needs_annotations, seen.coco_files)
        # Some models read the names as texts, and trackers follow some of the classes only.
        is_tracked = inherits(dataset.cls, 'mmdet.datasets.base_video_dataset', 'BaseVideoDataset')
        if not dataset.cfg.get('return_classes') and not is_tracked:
            _check_classes(dataset, seen)
            check_num_classes(cfg.get('model'), dataset)
        # A wrapper may make other images of them.
        if dataset.field == f'{loader_field}.dataset' and is_grey(dataset):
            check_widths(cfg, dataset)
    each_its_own = evaluator_field and 'dataset_prefixes' in (cfg.get(evaluator_field) or ())
    for index, (field, evaluator) in enumerate(evaluators):
        ann_file = evaluator.get('ann_file')
        if isinstance(ann_file, str) and not is_remote(ann_file) and not osp.isfile(ann_file):
            raise ConfigError(f"{field}.ann_file: there is no file '{ann_file}'; {GET_DATA}")
        metric = class_of(cfg, evaluator.get('type'), METRICS)
        if inherits(metric, 'mmdet.evaluation.metrics.coco_metric', 'CocoMetric'):
            measured = datasets[index : index + 1] if each_its_own else datasets
            check_coco_metric(field, evaluator, measured, seen.coco_files)


def _check_fields(loader: Mapping, field: str) -> None:
    """Complain about what neither PyTorch's data loader nor MMEngine reads."""
    more = ('num_batch_per_epoch', 'disable_subprocess_warning')
    known = [*inspect.signature(DataLoader).parameters, *more]
    for name in loader:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f'{field}.{name}: a data loader has no such field; '
                + (f"did you mean '{close[0]}'?" if close else f'it has {", ".join(known)}')
            )


def _check_classes(dataset: Dataset, seen: _Seen) -> None:
    """Complain about classes that are not those of the folders, or not those of the training."""
    classes = dataset.new_classes or classes_of(dataset)
    if classes is None:
        return
    folders = None if dataset.new_classes else class_folders(dataset)
    fix = 'give both the same classes in the same order'
    if folders is not None:
        fix = (
            f"give '{image_folder(dataset)}' exactly one folder for each class, an empty one where "
            'it has no images'
        )
        if len(classes) != len(folders):
            raise ConfigError(
                f'{dataset.field} has {len(classes)} classes ({quote(classes)}), but '
                f'{len(folders)} folders ({quote(folders)}): {fix}'
            )
        if set(classes) & set(folders):  # otherwise these are other words for the same
            in_order = 'give the names of the classes in the order of the folders'
            check_same_classes(classes, dataset.field, folders, 'the list of folders', in_order)
    if not seen.trained:
        seen.trained.append(dataset)
    trained = seen.trained[0]
    known = trained.new_classes or classes_of(trained)
    if folders is not None and not trained.new_classes and class_folders(trained) is not None:
        classes, known = folders, class_folders(trained)
    if known is not None:
        check_same_classes(classes, dataset.field, known, trained.field, fix)


def _evaluators(cfg: Config, field: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    evaluator = cfg.get(field) if field else None
    if isinstance(evaluator, Mapping) and 'metrics' in evaluator:
        evaluator, field = evaluator['metrics'], f'{field}.metrics'
    if isinstance(evaluator, Mapping):
        yield field, evaluator
    elif isinstance(evaluator, Sequence):
        for index, item in enumerate(evaluator):
            if isinstance(item, Mapping):
                yield f'{field}[{index}]', item


def _check_paths(dataset: Dataset) -> None:
    data_root = dataset.cfg.get('data_root')
    if data_root and not osp.isdir(data_root):
        raise ConfigError(
            f"{dataset.field}.data_root: there is no folder '{data_root}'; {GET_DATA}"
        )
    ann_file = dataset.cfg.get('ann_file')
    if isinstance(ann_file, str) and ann_file and not is_remote(ann_file):
        path = dataset.path(ann_file)
        # An mmpretrain data set may take a folder here.
        if not osp.exists(path):
            raise ConfigError(f"{dataset.field}.ann_file: there is no file '{path}'; {GET_DATA}")
    for key, folder in _prefixes(dataset.cfg).items():
        if folder and not is_remote(folder) and not osp.isdir(dataset.path(folder)):
            raise ConfigError(
                f'{dataset.field}.data_prefix{key}: there is no folder '
                f"'{dataset.path(folder)}'; {GET_DATA}"
            )


def _prefixes(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Folders of ``data_prefix`` by the key to print."""
    prefix = cfg.get('data_prefix') or {}
    if isinstance(prefix, str):
        return {'': prefix}
    return {f'.{key}': value for key, value in prefix.items() if isinstance(value, str)}
