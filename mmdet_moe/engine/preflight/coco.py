"""Checks of COCO annotation files and of the images that they name."""

import gc
import json
import os.path as osp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmdet_moe.engine.preflight.datasets import GET_DATA, Dataset, classes_of, inherits, quote
from mmdet_moe.errors import ConfigError

_IMAGES_TO_LOOK_AT = 5


@dataclass(frozen=True)
class CocoFile:
    """What the checks need of an annotation file."""

    categories: tuple[str, ...]
    first_images: tuple[str, ...]
    num_images: int
    has_annotations: bool


def reads_coco(cls: type | None) -> bool:
    """Whether a data set reads plain COCO detection JSON (LVIS and panoptic ones differ)."""
    return inherits(cls, 'mmdet.datasets.coco', 'CocoDataset', 'load_data_list', 'parse_data_info')


def check_coco(dataset: Dataset, needs_annotations: bool, coco_files: dict[str, CocoFile]) -> None:
    """Complain about an annotation file, the classes chosen from it, and its first images.

    Args:
        dataset: one for which :func:`reads_coco` holds.
        needs_annotations: whether ground truth is asked for.
        coco_files: what was read for another loader, by path, which is not read again; added to.

    Raises:
        ConfigError: the first thing that is wrong.
    """
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


def _read_coco(path: str, field: str) -> CocoFile:
    if not osp.isfile(path):
        raise ConfigError(f"{field}: there is no file '{path}'; {GET_DATA}")
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
    return CocoFile(
        categories=tuple(str(category.get('name')) for category in content['categories']),
        first_images=tuple(
            image['file_name'] for image in images[:_IMAGES_TO_LOOK_AT] if 'file_name' in image
        ),
        num_images=len(images),
        has_annotations=isinstance(content.get('annotations'), list),
    )


def _check_classes(dataset: Dataset, coco: CocoFile, path: str) -> None:
    classes = classes_of(dataset)
    if classes is None:
        return
    field = f'{dataset.field}.metainfo.classes'
    known = set(coco.categories)
    missing = [name for name in classes if name not in known]
    if missing:
        raise ConfigError(
            f"{field}: {quote(missing)} not among the categories of '{path}', which has "
            f'{quote(coco.categories)}; set it to the names of that file'
        )
    # MMDetection numbers the classes in the file's order and takes their names from the config.
    wanted = set(classes)
    in_file_order = tuple(name for name in coco.categories if name in wanted)
    if in_file_order != classes:
        raise ConfigError(
            f"{field} must be in the order of the categories of '{path}', {quote(in_file_order)}, "
            f'got {quote(classes)}'
        )


def _check_images(dataset: Dataset, coco: CocoFile) -> None:
    prefix = dataset.cfg.get('data_prefix') or {}
    folder = dataset.path(prefix.get('img', '') if isinstance(prefix, Mapping) else prefix)
    paths = [osp.join(folder, name) for name in coco.first_images]
    found = [path for path in paths if osp.isfile(path)]
    field = f'{dataset.field}.data_prefix.img'
    if paths and not found:
        raise ConfigError(
            f"{field}: none of the first {len(paths)} images of '{dataset.cfg.get('ann_file')}' "
            f"exists, for example '{paths[0]}'; {GET_DATA}"
        )
    for path in found:
        if osp.getsize(path) == 0:
            raise ConfigError(f"{field}: the image '{path}' is an empty file; copy it again")
