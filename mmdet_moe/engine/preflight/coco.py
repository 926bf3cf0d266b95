"""Checks of COCO annotation files and of the images that they name."""

import os.path as osp
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from mmdet_moe.compat.distributed import note
from mmdet_moe.datasets.coco_file import (
    IGNORED,
    TOO_SMALL,
    USED,
    CocoFile,
    read_coco_file,
    without_box,
)
from mmdet_moe.engine.preflight.datasets import (
    GET_DATA,
    Dataset,
    classes_of,
    inherits,
    is_remote,
    quote,
)
from mmdet_moe.errors import ConfigError

_IMAGES_TO_LOOK_AT = 5
_OTHERS = 'of other categories'


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
    if is_remote(path):
        return
    if path not in coco_files:
        coco_files[path] = _read_coco(path, field)
    coco = coco_files[path]
    if needs_annotations and not coco.has_annotations:
        raise ConfigError(
            f"{field}: '{path}' is not a COCO annotation file, it has no `annotations`"
        )
    if not coco.images:
        raise ConfigError(f"{field}: '{path}' lists no images")
    _check_classes(dataset, coco, path)
    _check_images(dataset, coco)
    _count_what_is_left_out(dataset, coco, path, needs_annotations)


def check_coco_metric(
    field: str,
    metric: Mapping[str, Any],
    datasets: Sequence[Dataset],
    coco_files: dict[str, CocoFile],
) -> None:
    """Complain about a metric that would confuse images, which it knows by their ids alone.

    Args:
        field: Of the metric.
        metric: The config of a CocoMetric.
        datasets: The data sets whose images it gets, checked by :func:`check_coco`.
        coco_files: What was read of them; added to.

    Raises:
        ConfigError: Two data sets share ids, or the metric's ``ann_file`` lists other images.
    """
    images: dict[Any, tuple[str, Dataset]] = {}
    paths = [dataset.path(dataset.cfg.get('ann_file') or '') for dataset in datasets]
    if not all(reads_coco(d.cls) and p in coco_files for d, p in zip(datasets, paths, strict=True)):
        return
    for dataset, path in zip(datasets, paths, strict=True):
        for id_, (name, _) in coco_files[path].images.items():
            if id_ in images:
                raise ConfigError(
                    f'{images[id_][1].field} and {dataset.field} share image ids such as {id_}, '
                    f'by which {field} tells images, so that it would mix them: evaluate with '
                    "type='MultiDatasetsEvaluator', and one of its metrics and dataset_prefixes "
                    'for each data set'
                )
            images[id_] = osp.basename(name), dataset
    ann_file = metric.get('ann_file')
    if not ann_file or is_remote(ann_file) or metric.get('format_only') or not images:
        return
    for dataset in datasets:
        if dataset.cfg.get('indices') is not None:
            note(
                f'{field} counts the objects of all {len(images)} images as missed but for those '
                f'that {dataset.field}.indices chooses, because it reads them from its ann_file'
            )
    if ann_file not in coco_files:
        same = [path for path in paths if osp.samefile(path, ann_file)]
        coco_files[ann_file] = (
            coco_files[same[0]] if same else _read_coco(ann_file, f'{field}.ann_file')
        )
    found = {id_: osp.basename(name) for id_, (name, _) in coco_files[ann_file].images.items()}
    if found != {id_: name for id_, (name, _) in images.items()}:
        raise ConfigError(
            f"{field}.ann_file: '{ann_file}' does not list the images of {datasets[0].field}, "
            f"which '{paths[0]}' lists, so that it would look for other objects: give both one file"
        )


def _read_coco(path: str, field: str) -> CocoFile:
    if not osp.isfile(path):
        raise ConfigError(f"{field}: there is no file '{path}'; {GET_DATA}")
    content, coco = read_coco_file(path, f"{field}: '{path}'")
    if coco.has_annotations and (without := without_box(content)):
        raise ConfigError(
            f"{field}: '{path}' has {len(without)} annotations without a `bbox`, such as "
            f'{str(without[0])[:80]}; give them [x, y, width, height], or take them out'
        )
    return coco


def _count_what_is_left_out(
    dataset: Dataset, coco: CocoFile, path: str, needs_annotations: bool
) -> None:
    """Say which annotations and images of a file take no part.

    Raises:
        ConfigError: None of its annotations does, or ``filter_cfg`` leaves no image.
    """
    classes = classes_of(dataset)
    chosen = set(coco.categories if classes is None else classes)
    left_out = Counter()
    for (name, fate), count in coco.boxes.items():
        left_out[fate if name in chosen else _OTHERS] += count
    used, total = left_out.pop(USED, 0), coco.boxes.total()
    if left_out:
        reasons = ', '.join(f'{count} {reason}' for reason, count in left_out.most_common())
        # Metrics that read the file count some boxes that no training uses. One of several data
        # sets may hold nothing but counterexamples.
        counted = {} if dataset.field.startswith('train') else {IGNORED, TOO_SMALL} & {*left_out}
        is_background = {*left_out} == {_OTHERS} and '.datasets[' in dataset.field
        if needs_annotations and not used and not counted and not is_background:
            raise ConfigError(
                f"{dataset.field}.ann_file: none of the {total} annotations in '{path}' is used: "
                f'{reasons}; give it boxes [x, y, width, height] in px that belong to the chosen '
                'classes, without `iscrowd` and `ignore`'
            )
        note(f"{dataset.field}: of the {total} annotations in '{path}', {used} are used: {reasons}")
    if needs_annotations and not total:
        note(f"{dataset.field}: there are no annotations in '{path}'")
    cfg = dataset.cfg.get('filter_cfg') or {}
    if dataset.cfg.get('test_mode') or not cfg:
        return
    kept = {id_ for id_, (_, size) in coco.images.items() if min(size) >= cfg.get('min_size', 0)}
    if cfg.get('filter_empty_gt'):
        kept &= set().union(*(coco.showing[name] for name in chosen))
    if not kept:
        raise ConfigError(
            f"{dataset.field}.filter_cfg leaves none of the {len(coco.images)} images of '{path}' "
            '(without annotations of the chosen classes, or too small)'
        )
    if len(kept) < len(coco.images):
        note(
            f'{dataset.field}.filter_cfg keeps {len(kept)} of the {len(coco.images)} images of '
            f"'{path}'"
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
    if is_remote(folder):
        return
    names = [name for name, _ in islice(coco.images.values(), _IMAGES_TO_LOOK_AT)]
    paths = [osp.join(folder, name) for name in names]
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
