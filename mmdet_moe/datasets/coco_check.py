"""What is in a folder in COCO's layout, and what is wrong with it that a training would not say."""

from __future__ import annotations

import colorsys
import hashlib
import io
import math
import os.path as osp
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, UnidentifiedImageError

from mmdet_moe.compat.coco import boxes_of
from mmdet_moe.datasets.coco_file import (
    CROWD,
    SIZES,
    USED,
    CocoFile,
    count_objects,
    fate,
    read_coco_file,
    size_bin,
    without_box,
)
from mmdet_moe.datasets.coco_folder import decode, oriented_size, upright
from mmdet_moe.errors import ConfigError
from mmdet_moe.progress import progress_bar

#: So many images are on the contact sheet, in so many columns, each in a tile of so many px with a
#: line of text above it.
_TILES, _COLUMNS = 24, 6
_TILE, _LINE = (240, 200), 14
#: So many characters of a class's name are shown; as many as a tile has room for.
_LONGEST = 40
_EXAMPLES = 3
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
#: Rounding may put the edge of a box so many px out of its image.
_TOLERANCE = 1.0
#: Areas of masks may exceed a box that was rounded.
_AREA_TOLERANCE = 1.2
#: Line breaks and other control characters, and halves of characters, which no file can hold.
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


@dataclass(frozen=True)
class Part:
    """One split of a data set.

    Attributes:
        name: 'train', for example.
        annotations: Its annotation file.
        images: The folder of its images.
    """

    name: str
    annotations: Path
    images: Path


@dataclass
class Report:
    """What :func:`check` found.

    Attributes:
        splits: By split what :func:`~mmdet_moe.datasets.coco_file.count_objects` gives.
        classes: Objects by class, split and size bin.
        wrong: Sentences about what a training takes in silence, or stops at late.
        notes: Sentences about what may be meant so.
    """

    splits: dict[str, dict] = field(default_factory=dict)
    classes: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parts_of(folder: str | Path) -> list[Part]:
    """The splits of a folder in one of COCO's layouts.

    Either ``train.json``, ``val.json`` and ``images/``, or ``annotations/instances_<split>.json``
    and ``<split>/``.

    Raises:
        ConfigError: It is in neither.
    """
    folder = Path(folder)
    if parts := [
        Part(name, folder / f'{name}.json', folder / 'images')
        for name in ('train', 'val', 'test')
        if (folder / f'{name}.json').is_file()
    ]:
        return parts
    for file in sorted(folder.glob('annotations/instances_*.json')):
        name = file.stem.removeprefix('instances_')
        parts.append(Part(name, file, folder / name))
    if not parts:
        raise ConfigError(
            f'{folder} has neither train.json nor annotations/instances_*.json: give a folder in '
            "COCO's layout, or --ann FILE --images DIR"
        )
    return parts


def check(parts: Sequence[Part]) -> Report:
    """Count all objects and look at every image and annotation.

    Args:
        parts: The splits.

    Returns:
        What is there and what is wrong.
    """
    report, names, digests = Report(), {}, defaultdict(lambda: defaultdict(list))
    for part in parts:
        try:
            content, coco = _read(part)
        except ConfigError as error:
            report.wrong.append(_printable(str(error)))
            continue
        report.splits[part.name] = count_objects(content)
        names[part.name] = coco.categories
        wrong, notes = defaultdict(list), defaultdict(list)
        _look_at_annotations(content, coco, wrong, notes)
        _look_at_images(part, coco, digests, wrong)
        if repeated := _repeated(coco.categories):
            wrong['categories have a name that another one has'] += repeated
        wrong['categories have a name that is empty or has a line break or the like'] += [
            repr(n) for n in coco.categories if not n.strip() or _UNPRINTABLE.search(n)
        ]
        _count_classes(part.name, content, report.classes)
        report.wrong += _sentences(part.name, wrong)
        report.notes += _sentences(part.name, notes)
    if len(set(names.values())) > 1:
        report.wrong.append(f'{" and ".join(names)} have different categories, or another order')
    _compare_images(digests, report)
    return report


def _read(part: Part) -> tuple[dict, CocoFile]:
    if not part.annotations.is_file():
        raise ConfigError(f'there is no file {part.annotations}')
    content, coco = read_coco_file(str(part.annotations), str(part.annotations))
    if not coco.has_annotations or not coco.images:
        raise ConfigError(f'{part.annotations} lists no images, or has no `annotations`')
    return content, coco


def _look_at_annotations(
    content: Mapping, coco: CocoFile, wrong: dict[str, list], notes: dict[str, list]
) -> None:
    ids = [category['id'] for category in content['categories']]
    wrong['ids of categories are there twice'] += map(str, _repeated(ids))
    wrong['annotations have no `bbox`'] += [str(a)[:80] for a in without_box(content)]
    known, seen = set(ids), set()
    for box in boxes_of(content):
        file = coco.images.get(box['image_id'], ('',))[0]
        where = f'annotation {box["id"]} of {file or "image " + str(box["image_id"])}'
        if not all(map(math.isfinite, (*box['bbox'], box['area']))):
            wrong['boxes are not numbers, or their areas'].append(where)
            continue
        outcome = fate(box, coco.images)
        identity = (box['image_id'], box['category_id'], *box['bbox'])
        if box['category_id'] not in known:
            wrong['annotations are of a category that is not listed'].append(where)
        elif box.get('ignore'):
            notes[f'annotations are {outcome}'].append(where)
        elif outcome not in (USED, CROWD):
            wrong[f'annotations are left out by a training: {outcome}'].append(where)
        elif identity in seen:
            wrong['annotations repeat another one'].append(where)
        elif _leaves(box['bbox'], coco.images[box['image_id']][1]):
            wrong['boxes reach out of their image'].append(where)
        elif box['area'] > _AREA_TOLERANCE * box['bbox'][2] * box['bbox'][3]:
            wrong['areas, by which objects count as small or large, exceed their box'].append(where)
        if box['iscrowd']:
            notes['objects have iscrowd=1, which no evaluation counts'].append(where)
        seen.add(identity)
    without = set(coco.images).difference(*coco.showing.values())
    notes['images show no object'] += [coco.images[id_][0] for id_ in coco.images if id_ in without]
    notes['categories have no object'] += [n for n in coco.categories if n not in coco.showing]


def _leaves(bbox: Sequence[float], size: tuple[int, int]) -> bool:
    x, y, w, h = bbox
    out = max(-x, -y, x + w - size[0], y + h - size[1])
    return out > _TOLERANCE


def _look_at_images(
    part: Part, coco: CocoFile, digests: dict[str, dict[str, list]], wrong: dict[str, list]
) -> None:
    wrong['images are listed twice'] += _repeated(name for name, _ in coco.images.values())
    for name, size in progress_bar(coco.images.values(), desc=part.name, unit='image'):
        path = part.images / name
        if not osp.isfile(path):  # Path.is_file raises for a name that is too long
            wrong['images do not exist'].append(str(path))
            continue
        data = path.read_bytes()
        digests[hashlib.sha256(data).hexdigest()][part.name].append(name)
        try:
            with Image.open(io.BytesIO(data)) as image:
                found = oriented_size(image)
                decode(image)
        except _UNREADABLE as error:
            # Pillow would name the bytes in memory.
            is_image = not isinstance(error, UnidentifiedImageError)
            wrong['images cannot be read'].append(
                f'{path} ({error if is_image else "not an image of a known format"})'
            )
            continue
        if found != tuple(size):
            shapes = ['×'.join(map(str, of)) for of in (found, size)]
            wrong['images have another size than their annotation tells'].append(
                f'{name} ({shapes[0]}, not {shapes[1]})'
            )


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _count_classes(split: str, content: Mapping, classes: dict) -> None:
    names = {category['id']: category['name'] for category in content['categories']}
    for name in names.values():
        classes.setdefault(name, Counter())
    for box in boxes_of(content):
        if box['category_id'] in names and not box['iscrowd']:
            classes[names[box['category_id']]][split, size_bin(box['area'])] += 1


def _compare_images(digests: Mapping[str, Mapping[str, list]], report: Report) -> None:
    shared = [
        ' = '.join(f'{names[0]} of {split}' for split, names in by_split.items())
        for by_split in digests.values()
        if len(by_split) > 1
    ]
    report.wrong += _sentences('', {'image files are in several splits, byte for byte': shared})


def _sentences(split: str, found: Mapping[str, Sequence[str]]) -> list[str]:
    prefix = f'{split}: ' if split else ''
    return [
        _printable(f'{prefix}{len(examples)} {what}, such as {"; ".join(examples[:_EXAMPLES])}')
        for what, examples in found.items()
        if examples
    ]


def _printable(text: str) -> str:
    """Text that stays on its line and can be printed."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _short(name: str) -> str:
    return _printable(name[:_LONGEST])


def format_classes(report: Report) -> str:
    """A table: a row for each class, and objects of each size bin for each split."""
    head = [f'{split} {size}' for split in report.splits for size in SIZES]
    width = max([len(_short(name)) for name in report.classes] + [5])
    lines = [f'{"class":<{width}}' + ''.join(f'{text:>{len(text) + 2}}' for text in head)]
    for name, counts in report.classes.items():
        cells = [counts[split, size] for split in report.splits for size in SIZES]
        row = (f'{n:>{len(text) + 2}}' for n, text in zip(cells, head, strict=True))
        lines.append(f'{_short(name):<{width}}' + ''.join(row))
    return '\n'.join(lines)


def contact_sheet(parts: Sequence[Part]) -> Image.Image:
    """Images with their boxes, such that every class is seen if there is room for it.

    Args:
        parts: The splits, each of which gets its share of the sheet.

    Returns:
        RGB. An image that cannot be read is a grey square.

    Raises:
        ConfigError: An annotation file cannot be read.
    """
    tiles = []
    for part in parts:
        content, coco = _read(part)
        boxes = defaultdict(list)
        for box in boxes_of(content):
            boxes[box['image_id']].append(box)
        names = {category['id']: category['name'] for category in content['categories']}
        for id_ in _choose(coco, max(1, _TILES // len(parts))):
            tiles.append(_tile(part, coco.images[id_][0], boxes[id_], names))
    columns = min(_COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new('RGB', (columns * _TILE[0], rows * _TILE[1]), 'white')
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (column * _TILE[0], row * _TILE[1]))
    return sheet


def _choose(coco: CocoFile, wanted: int) -> list:
    """Ids of images: for each class in turn one that is not chosen yet, then any others."""
    queues = [sorted(ids & coco.images.keys(), key=str) for ids in coco.showing.values()]
    queues.append(list(coco.images))
    chosen = {}
    while len(chosen) < min(wanted, len(coco.images)):
        for queue in queues:
            fresh = next((id_ for id_ in queue if id_ not in chosen), None)
            if fresh is not None and len(chosen) < wanted:
                chosen[fresh] = None
    return list(chosen)


def _tile(part: Part, name: str, boxes: Sequence[Mapping], names: Mapping) -> Image.Image:
    tile = Image.new('RGB', _TILE, 'white')
    draw = ImageDraw.Draw(tile)
    try:
        with Image.open(part.images / name) as image:
            picture = upright(image)
    except _UNREADABLE:
        picture = Image.new('RGB', _TILE, 'grey')
    scale = min((_TILE[0] - 4) / picture.width, (_TILE[1] - _LINE - 4) / picture.height)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    tile.paste(picture.resize(size), (0, _LINE))
    draw.text((2, 1), _printable(f'{part.name}: {name}'[-38:]), 'black')
    numbers = {id_: number for number, id_ in enumerate(names)}
    for box in boxes:
        # Neighbours in number are far apart on the circle of colours.
        hue = numbers.get(box['category_id'], 0) * 0.618 % 1
        colour = tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.6, 1))
        x, y, w, h = (side * scale for side in box['bbox'])
        (x0, x1), (y0, y1) = sorted((x, x + w)), sorted((y + _LINE, y + h + _LINE))
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=1 if box['iscrowd'] else 2)
        text = _short(names.get(box['category_id'], '?')) + (' (crowd)' if box['iscrowd'] else '')
        left = max(0, min(x0, _TILE[0] - draw.textlength(text)))
        place = (left, max(_LINE, y0))
        draw.rectangle(draw.textbbox(place, text), fill=colour)
        draw.text(place, text, 'black')
    return tile
