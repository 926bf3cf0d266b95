"""A data set in YOLO's format, as Ultralytics lays it out, in COCO's layout.

Beside ``images/`` lies ``labels/`` with a text file for each image, a line for each object: number
of the class, centre, width and height as shares of the image. An image without a text file shows no
object. ``data.yaml`` names the classes and, if it does, the splits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml

from mmdet_moe.compat.distributed import note
from mmdet_moe.datasets.coco_folder import (
    Box,
    Labelled,
    already_there,
    digest,
    image_size,
    read_text,
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
            no image, no image has one, a split is empty, or the training has no object.
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
    _check_labels(source, images)
    splits = _splits(source, data, images, val_share)
    if splits['train'] and not any(_read(source, image).strip() for image in splits['train']):
        raise ConfigError(
            f'--source {source}: the label files of the training, of images such as '
            f'{splits["train"][0]}, are all empty or missing, so that there is nothing to learn; '
            'give the folder that holds the labels, or divide all images anew with --val-share'
        )
    made_of = {
        'data': 'yolo',
        'splits': {
            split: digest(
                f'{image.relative_to(source)} {image.stat().st_size} {_read(source, image)}'
                for image in some
            )
            for split, some in splits.items()
        },
        'classes': names,
        'size': size,
    }
    if (counts := already_there(out, made_of)) is not None:
        return 'already there', counts
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
    """Those below a folder, in linked folders too, that are not hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = here.resolve()
        # A link to a folder above would lead round in a circle.
        folders[:] = [
            name
            for name in folders
            if not name.startswith('.') and not real.is_relative_to((here / name).resolve())
        ]
        for name in names:
            if Path(name).suffix.lower() in suffixes and not name.startswith('.'):
                yield here / name


def _read_yaml(file: Path) -> Mapping:
    with explained(f'{file} is not YAML'):
        # All as text: a class may be called `no`, and a folder 2017_01.
        content = yaml.load(file.read_bytes(), yaml.BaseLoader)
    if not isinstance(content, Mapping):
        raise ConfigError(f'{file} has no entries such as `names`')
    return {key: value for key, value in content.items() if value not in ('null', '~')}


def _classes(given: Sequence[str], data: Mapping) -> list[str]:
    names, file = list(given) or data.get('names'), Path(*given[:1])
    if len(given) == 1 and (file.suffix in ('.txt', '.names', '.yaml', '.yml') or file.is_file()):
        if file.suffix in ('.yaml', '.yml'):
            names = _read_yaml(file).get('names')
        else:
            names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if isinstance(names, Mapping):
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise ConfigError(f'`names` of data.yaml must be numbered from 0, not {list(names)}')
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            'the classes have no names: give --classes, or a list of `names` in data.yaml'
        )
    if len(set(names)) < len(names) or '' in names:
        raise ConfigError(f'each class needs a name of its own, which they have not: {names}')
    if not given and data.get('nc', str(len(names))) != str(len(names)):
        raise ConfigError(
            f'data.yaml says nc: {data["nc"]}, but has {len(names)} names: mend it, or give '
            '--classes'
        )
    return names


def _check_labels(source: Path, images: Sequence[Path]) -> None:
    wanted = {_label_file(source, image) for image in images}
    found = set(_files(source, ('.txt',)))
    for file in sorted(found - wanted):
        if file.with_suffix('.txt') in wanted:
            raise ConfigError(f'{file} is not read: rename it, so that it ends with .txt')
        # Of labelImg, beside the labels.
        in_labels = 'labels' in file.relative_to(source).parts[:-1] and file.name != 'classes.txt'
        if in_labels:
            raise ConfigError(f'{file} has no image: add it, or take the label file out')
    if not found & wanted:
        raise ConfigError(
            f'--source {source}: no image has a label file; give the folder that holds both'
        )


def _label_file(source: Path, image: Path) -> Path:
    """Of an image: in ``labels`` in place of the last ``images`` of its path, or beside it."""
    beside = image.with_suffix('.txt')
    parts = list(beside.relative_to(source).parts)
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
    file = source.joinpath(*parts)
    return beside if beside.is_file() and not file.is_file() else file


def _read(source: Path, image: Path) -> str:
    """The labels of an image; none where there is no file."""
    file = _label_file(source, image)
    return read_text(file) if file.is_file() else ''


def _labelled(source: Path, names: Sequence[str], image: Path) -> Labelled:
    size, labels = image_size(image), _read(source, image)
    boxes = read_labels(labels, _label_file(source, image), size, len(names))
    parts = [part for part in image.relative_to(source).parts if part != 'images']
    return Labelled(image, '/'.join(parts), size, boxes)


def _splits(
    source: Path, data: Mapping, images: Sequence[Path], val_share: float | None
) -> dict[str, list[Path]]:
    if val_share is None and (splits := _told(source, data, images) or _by_folder(source, images)):
        if left_out := sorted(set(images).difference(*splits.values())):
            note(f'{len(left_out)} images are in no split and left out, such as {left_out[0]}')
        return splits
    shuffled = list(images)
    random.Random(0).shuffle(shuffled)
    num_val = max(1, round(len(images) * (val_share or _VAL_SHARE)))
    return {'train': sorted(shuffled[num_val:]), 'val': sorted(shuffled[:num_val])}


def _told(source: Path, data: Mapping, images: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The splits that ``data.yaml`` tells: each a folder, a text file of images, or several."""
    if not (data.get('train') and data.get('val')):
        return None
    splits, root = {}, source / str(data.get('path') or '')
    # Without the links on the way, but with the name of an image that is a link itself.
    real = {folder: folder.resolve() for folder in {image.parent for image in images}}
    known = {real[image.parent] / image.name: image for image in images}
    for split in ('train', 'val'):
        entries = data[split] if isinstance(data[split], list) else [data[split]]
        found = set()
        for entry in entries:
            # Many say ../train/images of what lies beside the file.
            name = str(entry).removeprefix('../')
            places = (source / name, root / name, source / str(entry))
            place = next((place for place in places if place.exists()), None)
            if place is None:
                raise ConfigError(
                    f'{source / "data.yaml"} has {split}: {entry}, and there is no such place in '
                    f'{source}: mend it, or divide all images anew with --val-share'
                )
            if place.is_file():
                found |= _listed(place, known)
            else:
                whole = place.resolve()
                found |= {image for image in images if real[image.parent].is_relative_to(whole)}
        splits[split] = sorted(found)
    if both := set(splits['train']) & set(splits['val']):
        raise ConfigError(
            f'{source / "data.yaml"} puts {min(both)} into train and into val: mend it, or divide '
            'all images anew with --val-share'
        )
    return splits


def _listed(file: Path, known: Mapping[Path, Path]) -> set[Path]:
    found = set()
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        path = file.parent / line
        if (path := path.parent.resolve() / path.name) not in known:
            raise ConfigError(
                f'{file} lists {line}, and there is no such image in --source: mend it, or divide '
                'all images anew with --val-share'
            )
        found.add(known[path])
    return found


def _by_folder(source: Path, images: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The splits that names of folders tell, such as images/train2017 and valid/images."""
    splits = {'train': [], 'val': []}
    for image in images:
        folders = reversed(image.relative_to(source).parts[:-1])
        # The innermost one that tells.
        told = (split for folder in folders for split in splits if folder.lower().startswith(split))
        if (split := next(told, None)) is not None:
            splits[split].append(image)
    return splits if all(splits.values()) else None
