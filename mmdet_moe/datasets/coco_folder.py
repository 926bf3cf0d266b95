"""Write labelled images as a folder in COCO's layout: train.json, val.json and images/."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

from mmdet_moe.datasets.coco_file import count_objects
from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.files import scratch_folder
from mmdet_moe.progress import progress_bar

T = TypeVar('T')
#: What a folder was made of, as JSON.
NOTE = 'dataset.json'
#: OpenCV turns images of these formats as their EXIF data say (and TIFF, which Pillow turns, too).
_TURNED = ('JPEG', 'MPO', 'PNG')
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Box:
    """An object.

    Attributes:
        label: Number of its class, from 0.
        corners: ``(x0, y0, x1, y1)`` in px of the image; ``x1 - x0`` is its width.
        crowd: Whether it is written with ``iscrowd=1``: not counted as missed, nor trained.
        area: In px², by which it counts as small or large; None for that of the box.
    """

    label: int
    corners: tuple[float, float, float, float]
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True)
class Labelled:
    """An image with its objects.

    Attributes:
        file: The image.
        name: Its name in the folder, below ``images/``.
        size: Width and height in px, of :func:`image_size`.
        boxes: The objects.
    """

    file: Path
    name: str
    size: tuple[int, int]
    boxes: Sequence[Box]


def image_size(file: str | Path) -> tuple[int, int]:
    """Width and height in px of an image, turned as its EXIF data say, as OpenCV reads it.

    Raises:
        ConfigError: It cannot be read to its end.
    """
    with explained(f'{file} cannot be read as an image'), Image.open(file) as image:
        size = oriented_size(image)
        decode(image)
        return size


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """:func:`image_size` of an image that is open."""
    quarter = image.format in _TURNED and image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
    return image.size[::-1] if quarter else image.size


def decode(image: Image.Image) -> None:
    """Read an image that is open to its end, to see whether it is whole."""
    # A JPEG takes a fraction of the time that all of its pixels take.
    image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    if image.mode == 'F':
        raise ValueError('pixels are floating-point numbers, which OpenCV reads as no image')


def upright(image: Image.Image) -> Image.Image:
    """RGB, as OpenCV reads an image that is open."""
    if image.mode == 'I;16':  # which Pillow would clip to 255
        image = image.point(lambda value: value / 256).convert('L')
    return (ImageOps.exif_transpose(image) if image.format in _TURNED else image).convert('RGB')


def already_there(out: str | Path, made_of: Mapping[str, object]) -> dict | None:
    """Counts of the splits of a folder that :func:`write_folder` made of the same; None for none.

    Raises:
        ConfigError: There is something else.
    """
    out = Path(out)
    if (out / NOTE).is_file():
        with explained(f'{out / NOTE} is no note of what a data set was made of'):
            noted = json.loads((out / NOTE).read_text())
            whole = all((out / name).exists() for name in ('images', 'train.json', 'val.json'))
            if whole and noted.get('made_of') == made_of:
                return noted['splits']
    elif not any((out / name).exists() for name in ('images', 'train.json', 'val.json')):
        return None
    raise ConfigError(
        f'{out} holds another data set, part of one, or one made with other options: choose '
        'another --out, or move it away'
    )


def write_folder(
    out: str | Path,
    splits: Mapping[str, Sequence[T]],
    label: Callable[[T], Labelled],
    classes: Sequence[str],
    made_of: Mapping[str, object],
    size: int | None = None,
) -> dict:
    """Write a data set, whole or not at all. What else is in ``out`` stays.

    Images that keep their size are hard links where the disk allows.

    Args:
        out: The folder, for which :func:`already_there` is None.
        splits: Images by 'train' and 'val'.
        label: Of an image, what to write.
        classes: Names, in the order of the labels; category ids begin with 1.
        made_of: What decides about the result, as JSON has it.
        size: Longer side of every image in px; None to keep the images as they are.

    Returns:
        By split what :func:`~mmdet_moe.datasets.coco_file.count_objects` gives.

    Raises:
        ConfigError: A split has no images, two images have one name, or one cannot be read.
    """
    out = Path(out)
    with scratch_folder(out / '.writing') as scratch:
        (scratch / 'images').mkdir()
        counts, image_id, box_id = {}, 0, 0
        for split, listed in splits.items():
            if not listed:
                raise ConfigError(f'there is no image for the split {split!r}')
            images, annotations = [], []
            for item in map(label, progress_bar(listed, desc=split, unit='image')):
                image_id += 1
                width, height = _store(item, scratch / 'images' / item.name, size)
                images.append(
                    {'id': image_id, 'file_name': item.name, 'width': width, 'height': height}
                )
                scale = (width / item.size[0], height / item.size[1]) * 2
                for box in item.boxes:
                    box_id += 1
                    x0, y0, x1, y1 = (c * s for c, s in zip(box.corners, scale, strict=True))
                    area = (x1 - x0) * (y1 - y0)
                    if box.area is not None:
                        area = box.area * scale[0] * scale[1]
                    annotations.append(
                        {
                            'id': box_id,
                            'image_id': image_id,
                            'category_id': box.label + 1,
                            'bbox': [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                            'area': round(area, 2),
                            'iscrowd': int(box.crowd),
                        }
                    )
            content = {
                'images': images,
                'annotations': annotations,
                'categories': [{'id': i, 'name': name} for i, name in enumerate(classes, start=1)],
            }
            (scratch / f'{split}.json').write_text(json.dumps(content))
            counts[split] = count_objects(content)
        (scratch / NOTE).write_text(json.dumps({'made_of': made_of, 'splits': counts}, indent=2))
        # The note at last: without it nothing counts as there.
        for name in ('images', *(f'{split}.json' for split in splits), NOTE):
            (scratch / name).rename(out / name)
    return counts


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of some text, for ``made_of``."""
    # File names may be of another encoding.
    return hashlib.sha256('\n'.join(lines).encode(errors='surrogateescape')).hexdigest()


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        ConfigError: It cannot be read.
    """
    with explained(f'{file} cannot be read as text'):
        return file.read_text(encoding='utf-8-sig')


def read_ids(file: Path) -> list[str]:
    """The ids of a file of ``--ids``, each once, in its order.

    Raises:
        ConfigError: There is no such file, or it lists nothing.
    """
    if not file.is_file():
        raise ConfigError(f'--ids: there is no file {file}')
    if not (ids := read_text(file).split()):
        raise ConfigError(f'--ids: {file} lists no image')
    return list(dict.fromkeys(ids))


def _store(item: Labelled, target: Path, size: int | None) -> tuple[int, int]:
    if Path(item.name).is_absolute() or '..' in Path(item.name).parts:
        raise ConfigError(f'{item.file}: {item.name!r} leads out of the data set; rename the image')
    if target.exists():
        raise ConfigError(f'{item.file}: there is another image {item.name!r}; rename one')
    target.parent.mkdir(parents=True, exist_ok=True)
    if size is None or max(item.size) == size:
        try:
            os.link(item.file.resolve(), target)
        except OSError:  # another disk, or somebody else's file
            shutil.copyfile(item.file, target)
        return item.size
    scaled = tuple(max(1, round(side * size / max(item.size))) for side in item.size)
    with explained(f'{item.file} cannot be read as an image'), Image.open(item.file) as image:
        upright(image).resize(scaled, Image.Resampling.BICUBIC).save(target, quality=_JPEG_QUALITY)
    return scaled
