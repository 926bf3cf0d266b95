"""Checks of the image sets that MMPretrain reads as whole arrays: CIFAR and MNIST's formats.

MMPretrain compares CIFAR's checksums itself, but only says that it cannot find the data set; of
MNIST's files it checks nothing but that they exist. Here the checksums are those that the data
set's class expects. For MNIST's format it knows none of the uncompressed files, so their structure
is checked, and any data set in that format passes.
"""

import os.path as osp
import shlex

from mmdet_moe.datasets.class_folders import checksums
from mmdet_moe.datasets.download import CIFAR, md5_of
from mmdet_moe.datasets.idx import check_pair, read_idx
from mmdet_moe.engine.preflight.datasets import Dataset, classes_of, inherits, is_remote
from mmdet_moe.errors import ConfigError

# A label of an idx file is a byte, so without class names every label is in order.
_NUM_BYTES = 256
# Others may make colours of grey.
_KEEP_CHANNELS = ('RandomCrop', 'RandomFlip', 'CenterCrop', 'Resize', 'Pad', 'PackInputs')


def reads_arrays(cls: type | None) -> bool:
    """Whether a data set reads its files as MMPretrain's CIFAR and MNIST classes do."""
    return _reads_cifar(cls) or _reads_idx(cls)


def side_of(cls: type | None) -> int | None:
    """Of the images of such a data set in px; None for another one."""
    return 32 if _reads_cifar(cls) else 28 if _reads_idx(cls) else None


def _reads_cifar(cls: type | None) -> bool:
    return inherits(cls, 'mmpretrain.datasets.cifar', 'CIFAR10', 'load_data_list')


def _reads_idx(cls: type | None) -> bool:
    return inherits(cls, 'mmpretrain.datasets.mnist', 'MNIST', 'load_data_list')


def is_grey(dataset: Dataset) -> bool:
    """Whether the images of a data set certainly have one channel."""
    return _reads_idx(dataset.cls) and all(
        step.get('type') in _KEEP_CHANNELS for step in dataset.cfg.get('pipeline') or ()
    )


def check_arrays(dataset: Dataset, good_files: set[tuple]) -> None:
    """Complain about a split that is another one than it says, and about files on the disk.

    Args:
        dataset: one for which :func:`reads_arrays` holds.
        good_files: what was found right for another loader, which is not read again; added to.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    if _reads_idx(dataset.cls):
        _check_split(dataset)
    root = _root(dataset)
    if not dataset.is_local or dataset.downloads or is_remote(root):
        return
    if not osp.isdir(root):
        raise ConfigError(f"{_field(dataset)}: there is no folder '{root}'; {_get_data(dataset)}")
    if _reads_cifar(dataset.cls):
        _check_cifar(dataset, good_files)
    else:
        _check_idx(dataset, good_files)


def _check_split(dataset: Dataset) -> None:
    """MMPretrain's MNIST chooses the files by ``test_mode`` and ignores ``split``."""
    split = dataset.cfg.get('split')
    test_mode = bool(dataset.cfg.get('test_mode', False))
    if split is not None and test_mode != (split == 'test'):
        read, wanted = ('test', False) if test_mode else ('training', True)
        raise ConfigError(
            f'{dataset.field}: split={split!r} with test_mode={test_mode} reads the {read} images, '
            f'because MMPretrain chooses the files of {dataset.cls.__name__} by test_mode: set '
            f'{dataset.field}.test_mode={wanted}'
        )


def _root(dataset: Dataset) -> str:
    prefix = _prefix(dataset)
    return dataset.path(prefix) if prefix else dataset.cfg.get('data_root') or ''


def _prefix(dataset: Dataset) -> str:
    prefix = dataset.cfg.get('data_prefix')
    return prefix if isinstance(prefix, str) else ''


def _field(dataset: Dataset) -> str:
    """The field that says where the files are."""
    by_prefix = _prefix(dataset) and not dataset.cfg.get('data_root')
    return f'{dataset.field}.{"data_prefix" if by_prefix else "data_root"}'


def _command(dataset: Dataset) -> str | None:
    """The command of ``tools/prepare_data.py`` that brings a data set, if one does."""
    if _reads_cifar(dataset.cls):
        first = f'{dataset.cls.base_folder}/{dataset.cls.train_list[0][0]}'
        return next((name for name, archive in CIFAR.items() if first in archive.provides), None)
    is_fashion = inherits(dataset.cls, 'mmpretrain.datasets.mnist', 'FashionMNIST')
    return 'fashion-mnist' if is_fashion else None


def _run(dataset: Dataset, options: str = '') -> str | None:
    command = _command(dataset)
    if command is None:
        return None
    return f'`tools/prepare_data.py {command} --out {shlex.quote(_root(dataset))}{options}`'


def _get_data(dataset: Dataset) -> str:
    """How to mend that files are missing."""
    elsewhere = 'say where it is with `--cfg-options data_root=DIR`'
    run = _run(dataset)
    if run is None:
        return f'put the data set there, or {elsewhere}'
    variable = f'{_command(dataset).upper().replace("-", "_")}_ROOT'
    return f'prepare the data set with {run}, or {elsewhere} or the environment variable {variable}'


def _check_cifar(dataset: Dataset, good_files: set[tuple]) -> None:
    cls = dataset.cls
    run = _run(dataset)
    again = f'delete it and run {run}' if run else 'copy it again'
    folder = osp.join(_root(dataset), cls.base_folder)
    if hasattr(cls, 'expected_files'):
        expected = cls.expected_files(folder)
    else:
        _check_who_reads_it(dataset, folder)
        meta = (cls.meta['filename'], cls.meta.get('md5'))
        expected = [*cls.train_list, *cls.test_list, meta]
    for name, md5 in expected:
        path = osp.join(folder, name)
        if (path, md5) in good_files:
            continue
        _check_is_there(dataset, path)
        # A class without checksums is for files of the user's own.
        found = md5_of(path, progress=False) if md5 is not None else None
        if found != md5:
            raise ConfigError(
                f"{_field(dataset)}: '{path}' has the MD5 {found} instead of {md5}, so it is "
                f'incomplete, damaged or something else: {again}'
            )
        good_files.add((path, md5))


def _check_who_reads_it(dataset: Dataset, folder: str) -> None:
    if checksums(folder) is not None:
        raise ConfigError(
            f"{_field(dataset)}: '{folder}' was made from images by tools/prepare_data.py, whose "
            f"files MMPretrain's own class refuses: set "
            f"{dataset.field}.type='mmdet_moe.{dataset.cls.__name__}'"
        )


def _check_is_there(dataset: Dataset, path: str) -> None:
    if not osp.isfile(path):
        raise ConfigError(f"{_field(dataset)}: there is no file '{path}'; {_get_data(dataset)}")


def _check_idx(dataset: Dataset, good_files: set[tuple]) -> None:
    classes = classes_of(dataset)
    num_classes = _NUM_BYTES if classes is None else len(classes)
    run = _run(dataset, ' --overwrite')
    # They may be of another data set in this format, which no command brings back.
    again = f'to replace it by the published data set run {run}' if run else 'copy it again'
    for files in (dataset.cls.train_list, dataset.cls.test_list):
        # The class names what it would download, and reads it without the suffix.
        names = [name.rpartition('.')[0] for name, _ in files]
        paths = tuple(osp.join(_root(dataset), name) for name in names)
        if (paths, num_classes) in good_files:
            continue
        for path in paths:
            if osp.isfile(f'{path}.gz') and not osp.isfile(path):
                raise ConfigError(_is_gzipped(dataset, path))
            _check_is_there(dataset, path)
        try:
            images = read_idx(paths[0], 3, again)
            labels = read_idx(paths[1], 1, again)
            check_pair(images, labels, num_classes, *paths, again)
        except ConfigError as error:
            raise ConfigError(f'{_field(dataset)}: {error}') from error
        if len(images) == 0:
            raise ConfigError(f"{_field(dataset)}: '{paths[0]}' holds no images: {again}")
        good_files.add((paths, num_classes))


def _is_gzipped(dataset: Dataset, path: str) -> str:
    """The complaint about a folder of idx files as they are distributed."""
    run = _run(dataset, f' --source {shlex.quote(_root(dataset))}')
    fix = f'run {run}' if run else f'run `gunzip --keep {shlex.quote(path)}.gz`'
    return (
        f"{_field(dataset)}: '{path}' is there only with .gz, and MMPretrain does not "
        f'uncompress it: {fix}'
    )
