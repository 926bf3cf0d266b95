"""A data set in YOLO's format, as Ultralytics lays it out, in COCO's layout.

Beside ``images/`` lies ``labels/`` with a text file for each image, a line for each object: number
of the class, centre, width and height as shares of the image. An image without a text file shows no
object. ``data.yaml`` names the classes and, if it does, the splits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml

from mmdet_moe.datasets.coco_folder import (
    Box,
    Labelled,
    already_there,
    digest,
    image_size,
    write_folder,
)
from mmdet_moe.errors import ConfigError, explained

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
_VAL_SHARE = 0.1


def prepare_yolo(
    source: str | Path,
    out: str | Path,
    classes: Sequence[str] = (),
    val_share: float | None = None,
    size: int | None = None,
) -> tuple[str, dict]:
    """Write a data set in YOLO's format into a folder in COCO's layout.

    Args:
        source: Its folder.
        out: The folder to write.
        classes: Their names in the order of their numbers, or a text file with a name a line, or a
            ``data.yaml``; those of ``source/data.yaml`` by default.
        val_share: Share of all images that become the split 'val', drawn at random and always the
            same. By default the splits of ``data.yaml`` or of folders ``train`` and ``val`` are
            kept, and 0.1 is drawn where there are none.
        size: Longer side of every image in px; None to keep the images as they are.

    Returns:
        'written' or 'already there', and counts by split.

    Raises:
        ConfigError: Classes are not to be had, a line of a label file is wrong, a label file has
            no image, or a split is empty.
    """
    source = Path(source)
    if not source.is_dir():
        raise ConfigError(f'--source {source}: there is no such folder')
    if Path(out).resolve().is_relative_to(source.resolve()):
        raise ConfigError(f'--out {out} lies in --source: its images would be taken for new ones')
    if val_share is not None and not 0 < val_share < 1:
        raise ConfigError(f'--val-share must be above 0 and below 1, not {val_share}')
    data = _read_yaml(source / 'data.yaml') if (source / 'data.yaml').is_file() else {}
    names = _classes(classes, data)
    images = sorted(_files(source, _SUFFIXES))
    if not images:
        raise ConfigError(f'--source {source}: there is no image in it')
    splits = _splits(source, data, images, val_share)
    made_of = {
        'data': 'yolo',
        'splits': {
            split: digest(f'{image.relative_to(source)} {_read(source, image)}' for image in some)
            for split, some in splits.items()
        },
        'classes': names,
        'size': size,
    }
    if (counts := already_there(out, made_of)) is not None:
        return 'already there', counts
    _check_labels_have_images(source, images)
    label = partial(_labelled, source, names)
    return 'written', write_folder(out, splits, label, names, made_of, size)


def read_labels(text: str, file: str | Path, size: tuple[int, int], num_classes: int) -> list[Box]:
    """The objects of a label file; what of a box leaves the image is cut off.

    Args:
        text: Its content.
        file: Its name, for messages.
        size: Width and height of the image in px.
        num_classes: How many classes there are.

    Raises:
        ConfigError: A line is something else than a class and four numbers from 0 to 1, or its
            width or height is 0.
    """
    boxes = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not (words := line.split()):
            continue
        where = f'{file}, line {number}'
        with explained(f'{where}: {line!r} is not a class and four numbers'):
            label, (x, y, w, h) = int(words[0]), map(float, words[1:])
        if not 0 <= label < num_classes:
            raise ConfigError(
                f'{where}: there is no class {label}, for there are {num_classes} classes, from 0'
            )
        if not all(0 <= v <= 1 for v in (x, y, w, h)) or not w or not h:
            raise ConfigError(
                f'{where}: centre, width and height are {" ".join(words[1:])} and must be shares '
                'of the image, from 0 to 1, width and height not 0'
            )
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        corners = tuple(min(max(e, 0.0), 1.0) * s for e, s in zip(edges, size * 2, strict=True))
        boxes.append(Box(label, corners))
    return boxes


def _files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    return (
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in suffixes and not path.name.startswith('.')
    )


def _read_yaml(file: Path) -> Mapping:
    with explained(f'{file} is not YAML'):
        content = yaml.safe_load(file.read_text())
    if not isinstance(content, Mapping):
        raise ConfigError(f'{file} has no entries such as `names`')
    return content


def _classes(given: Sequence[str], data: Mapping) -> list[str]:
    if len(given) == 1 and Path(given[0]).is_file():
        file = Path(given[0])
        if file.suffix in ('.yaml', '.yml'):
            given, data = (), _read_yaml(file)
        else:
            given = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if given:
        return list(given)
    names = data.get('names')
    if isinstance(names, Mapping):
        if sorted(names) != list(range(len(names))):
            raise ConfigError(f'`names` of data.yaml must be numbered from 0, not {list(names)}')
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ConfigError('the classes have no names: give --classes, or `names` in data.yaml')
    return [str(name) for name in names]


def _check_labels_have_images(source: Path, images: Sequence[Path]) -> None:
    wanted = {_label_file(source, image) for image in images}
    for file in _files(source, ('.txt',)):
        if 'labels' in file.relative_to(source).parts[:-1] and file not in wanted:
            raise ConfigError(f'{file} has no image: add it, or take the label file out')


def _label_file(source: Path, image: Path) -> Path:
    """Of an image: in ``labels`` in place of the last ``images`` of its path, or beside it."""
    parts = list(image.relative_to(source).with_suffix('.txt').parts)
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
    return source.joinpath(*parts)


def _read(source: Path, image: Path) -> str:
    """The labels of an image; none where there is no file."""
    file = _label_file(source, image)
    with explained(f'{file} is not text'):
        return file.read_text(encoding='utf-8-sig') if file.is_file() else ''


def _labelled(source: Path, names: Sequence[str], image: Path) -> Labelled:
    size, labels = image_size(image), _read(source, image)
    boxes = read_labels(labels, _label_file(source, image), size, len(names))
    parts = [part for part in image.relative_to(source).parts if part != 'images']
    return Labelled(image, '/'.join(parts), size, boxes)


def _splits(
    source: Path, data: Mapping, images: Sequence[Path], val_share: float | None
) -> dict[str, list[Path]]:
    if val_share is None and (splits := _told(source, data, images) or _by_folder(source, images)):
        return splits
    shuffled = list(images)
    random.Random(0).shuffle(shuffled)
    num_val = max(1, round(len(images) * (val_share or _VAL_SHARE)))
    return {'train': sorted(shuffled[num_val:]), 'val': sorted(shuffled[:num_val])}


def _told(source: Path, data: Mapping, images: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The splits that ``data.yaml`` tells: each a folder, a text file of images, or several."""
    if not (data.get('train') and data.get('val')):
        return None
    splits, known = {}, set(images)
    for split in ('train', 'val'):
        entries = data[split] if isinstance(data[split], list) else [data[split]]
        found = set()
        for entry in entries:
            # Many say ../train/images of what lies beside the file.
            names = (str(entry), str(entry).removeprefix('../'))
            place = next((source / name for name in names if (source / name).exists()), None)
            if place is None:
                raise ConfigError(
                    f'{source / "data.yaml"} has {split}: {entry}, and there is no such place in '
                    f'{source}: mend it, or divide all images anew with --val-share'
                )
            if place.is_file():
                found |= {place.parent / line for line in place.read_text().split()} & known
            else:
                found |= {image for image in images if place.resolve() in image.resolve().parents}
        splits[split] = sorted(found)
    if both := set(splits['train']) & set(splits['val']):
        raise ConfigError(
            f'{source / "data.yaml"} puts {min(both)} into train and into val: mend it, or divide '
            'all images anew with --val-share'
        )
    return splits


def _by_folder(source: Path, images: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The splits that names of folders tell, such as images/train2017 and valid/images."""
    splits = {'train': [], 'val': []}
    for image in images:
        folders = reversed(image.relative_to(source).parts[:-1])
        # The innermost one that tells.
        told = (split for folder in folders for split in splits if folder.startswith(split))
        if (split := next(told, None)) is not None:
            splits[split].append(image)
    return splits if all(splits.values()) else None
