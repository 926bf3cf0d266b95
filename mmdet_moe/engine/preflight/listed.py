"""Checks of data sets that list their images in a text file, or have a folder of them per class."""

import os.path as osp
import xml.etree.ElementTree as ElementTree
from collections import Counter

from mmengine.fileio import list_dir_or_file

from mmdet_moe.compat.distributed import note
from mmdet_moe.engine.preflight.datasets import (
    GET_DATA,
    Dataset,
    class_folders,
    classes_of,
    image_folder,
    inherits,
    quote,
)
from mmdet_moe.errors import ConfigError

_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # MMPretrain's
_CUSTOM = ('mmpretrain.datasets.custom', 'CustomDataset', 'load_data_list')
_XML = ('mmdet.datasets.xml_style', 'XMLDataset', 'load_data_list', '_parse_instance_info')


def check_listed(dataset: Dataset) -> None:
    """Complain about labels without a class, and say which files and objects take no part.

    Args:
        dataset: Any, whose paths were checked; that of other kinds is left alone.

    Raises:
        ConfigError: A label is not one of the classes, an annotation file is missing or broken, or
            no image is left.
    """
    if inherits(dataset.cls, *_XML) and dataset.cfg.get('ann_file'):
        _count_objects(dataset)
    elif class_folders(dataset) is not None:
        _count_files(dataset)
    else:
        largest, classes = largest_label(dataset), classes_of(dataset)
        if largest is not None and classes and largest >= len(classes):
            raise ConfigError(
                f"{dataset.field}.ann_file: '{dataset.path(dataset.cfg['ann_file'])}' has the "
                f'label {largest}, but {len(classes)} classes ({quote(classes)}) are numbered from '
                f'0 to {len(classes) - 1}'
            )


def largest_label(dataset: Dataset) -> int | None:
    """That of MMPretrain's lists of images and labels; None of other data sets."""
    cfg = dataset.cfg
    if not inherits(dataset.cls, *_CUSTOM) or not cfg.get('with_label', True):
        return None
    path = dataset.path(cfg.get('ann_file') or '')
    if not dataset.is_local or not osp.isfile(path):
        return None
    largest = -1
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            label = line.strip().rpartition(' ')[2]
            if not label.isdecimal():
                raise ConfigError(
                    f"{dataset.field}.ann_file: line {number} of '{path}' must be the path of an "
                    f'image and its label, a number from 0 on, got {line.strip()!r}'
                )
            largest = max(largest, int(label))
    if largest < 0:
        raise ConfigError(f"{dataset.field}.ann_file: '{path}' lists no images")
    return largest


def _count_files(dataset: Dataset) -> None:
    folder, cfg = image_folder(dataset), dataset.cfg
    extensions = tuple(e.lower() for e in cfg.get('extensions', _EXTENSIONS))
    files = list(list_dir_or_file(folder, list_dir=False, recursive=True))
    unread = [f for f in files if osp.sep not in f or not f.lower().endswith(extensions)]
    if unread:
        note(
            f"{dataset.field}: {len(unread)} of the {len(files)} files in '{folder}' are not read, "
            f"such as '{unread[0]}': they lie in no folder of a class, or end in none of "
            f'{", ".join(extensions)} (extensions)'
        )


def _count_objects(dataset: Dataset) -> None:
    cfg, listed = dataset.cfg, dataset.path(dataset.cfg['ann_file'])
    prefix = (cfg.get('data_prefix') or {}).get('sub_data_root', '')
    folder = osp.join(dataset.path(prefix), cfg.get('ann_subdir', 'Annotations'))
    with open(listed, encoding='utf-8') as file:
        ids = file.read().splitlines()
    names: Counter[str] = Counter()
    for id_ in ids:
        path = osp.join(folder, f'{id_}.xml')
        try:
            names.update(node.findtext('name') for node in ElementTree.parse(path).iter('object'))
        except FileNotFoundError:
            raise ConfigError(
                f"{dataset.field}: there is no annotation file '{path}', which '{listed}' lists; "
                f'{GET_DATA}'
            ) from None
        except ElementTree.ParseError as error:
            raise ConfigError(
                f"{dataset.field}: '{path}' is no XML, or an incomplete copy of it ({error})"
            ) from error
    if not ids:
        raise ConfigError(f"{dataset.field}.ann_file: '{listed}' lists no images")
    others = sorted(set(names) - set(classes_of(dataset) or ()), key=str)
    if others:
        used = names.total() - sum(names[name] for name in others)
        note(
            f"{dataset.field}: of the {names.total()} objects of '{listed}', {used} are used: "
            f'{quote(others)} are not among the classes'
        )
