"""Some images and classes of COCO, as a folder in COCO's layout of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmdet_moe.compat.coco import read_coco
from mmdet_moe.datasets.coco_folder import (
    Box,
    Labelled,
    already_there,
    digest,
    image_size,
    read_ids,
    write_folder,
)
from mmdet_moe.errors import ConfigError, explained

_SPLITS = ('train2017', 'val2017')


def prepare_coco_part(
    out: str | Path,
    source: str | Path,
    ids: Sequence[str | Path],
    classes: Sequence[str],
    size: int | None = None,
) -> tuple[str, dict]:
    """Write images of COCO with the objects of some classes into a folder in COCO's layout.

    Crowds keep ``iscrowd=1``.

    Args:
        out: The folder to write.
        source: COCO 2017 as ``tools/prepare_data.py coco`` unpacks it. Images are looked for in
            both of its splits; a split whose annotations are not there is passed over.
        ids: Text files with the name of an image ('000000000139') a line, of those to train and of
            those to validate with.
        classes: Names of the classes, in the order of their new ids; all of COCO's if empty.
        size: Longer side of every image in px; None to keep the images as they are.

    Returns:
        'written' or 'already there', and counts by split.

    Raises:
        ConfigError: There are no annotations, a class or an image is not in them, or an image is in
            both files or not on the disk.
    """
    if len(ids) != 2:
        raise ConfigError(f'--ids takes two files, for train and val, not {len(ids)}')
    splits = dict(zip(('train', 'val'), (read_ids(Path(file)) for file in ids), strict=True))
    if both := set(splits['train']) & set(splits['val']):
        raise ConfigError(f'--ids: both files list {min(both)}, which can be in one split only')
    if len(set(classes)) < len(classes):
        raise ConfigError(f'--classes {" ".join(classes)}: give different names')
    made_of = {
        'data': 'coco-part',
        'ids': [digest(some) for some in splits.values()],
        'classes': list(classes),
        'size': size,
        'areas': 'masks',  # an earlier version wrote those of boxes
    }
    if (counts := already_there(out, made_of)) is not None:
        return 'already there', counts
    found, names = _read(Path(source), set().union(*splits.values()), classes)
    if missing := sorted(set().union(*splits.values()) - set(found)):
        raise ConfigError(
            f'--ids: {missing[0]} ({len(missing)} in all) is not in the annotations of {source}; '
            'get both splits by `tools/prepare_data.py coco`'
        )
    label = partial(_labelled, found)
    return 'written', write_folder(out, splits, label, names, made_of, size)


def _read(
    source: Path, wanted: set[str], classes: Sequence[str]
) -> tuple[dict[str, tuple[Path, list[Box]]], list[str]]:
    """By its name, the file of each image that is wanted, and its objects; the classes."""
    names = list(classes)
    found: dict[str, tuple[Path, list[Box]]] = {}
    files = {split: source / 'annotations' / f'instances_{split}.json' for split in _SPLITS}
    if not any(file.is_file() for file in files.values()):
        raise ConfigError(f'--source {source}: there is no {files["val2017"]}')
    for split, file in files.items():
        if not file.is_file():
            continue
        with explained(f'{file} is not JSON'):
            content, _ = read_coco(str(file))
        numbers = {category['name']: category['id'] for category in content['categories']}
        names = names or list(numbers)
        if unknown := [name for name in names if name not in numbers]:
            raise ConfigError(f'--classes: {file} has no class {unknown[0]!r}')
        labels = {numbers[name]: label for label, name in enumerate(names)}
        of_image: dict[object, list[Box]] = {}
        for image in content['images']:
            name = Path(image['file_name'])
            if name.stem in wanted:
                of_image[image['id']] = boxes = []
                found[name.stem] = source / split / name, boxes
        for entry in content['annotations']:
            if entry['image_id'] in of_image and entry['category_id'] in labels:
                x, y, width, height = entry['bbox']
                corners = (x, y, x + width, y + height)
                label, crowd = labels[entry['category_id']], bool(entry.get('iscrowd'))
                # COCO's is that of the mask, less than that of the box.
                of_image[entry['image_id']].append(Box(label, corners, crowd, entry.get('area')))
    return found, names


def _labelled(found: dict[str, tuple[Path, list[Box]]], name: str) -> Labelled:
    file, boxes = found[name]
    if not file.is_file():
        raise ConfigError(f'there is no {file}: unpack the archives of its split')
    return Labelled(file, file.name, image_size(file), boxes)
