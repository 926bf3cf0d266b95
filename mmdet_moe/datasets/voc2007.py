"""PASCAL VOC2007 in COCO's layout, downloaded or from a folder that has it.

``trainval`` becomes the split 'train', ``test`` becomes 'val'. Objects that VOC calls difficult
have ``iscrowd=1``: as in VOC's own evaluation, they count neither as hits nor as misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection
from torchvision.datasets.voc import DATASET_YEAR_DICT

from mmdet_moe.datasets.coco_folder import (
    Box,
    Labelled,
    already_there,
    digest,
    image_size,
    read_ids,
    write_folder,
)
from mmdet_moe.datasets.download import Archive, prepare
from mmdet_moe.errors import ConfigError, explained

#: In the official order, which is alphabetical.
CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
    'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
    'tvmonitor',
)  # fmt: skip
_OFFICIAL = {'train': 'trainval', 'val': 'test'}


def _archive(key: str, split: str, num_bytes: int) -> Archive:
    published = DATASET_YEAR_DICT[key]
    return Archive(
        path=published['filename'],
        md5=published['md5'],
        num_bytes=num_bytes,
        unpacked_bytes=num_bytes,
        provides={f'{published["base_dir"]}/ImageSets/Main/{_OFFICIAL[split]}.txt': None},
    )


ARCHIVES = (_archive('2007', 'train', 460_032_000), _archive('2007-test', 'val', 451_020_800))
URL_BASE = DATASET_YEAR_DICT['2007']['url'].rpartition('/')[0]


def prepare_voc2007(
    out: str | Path,
    source: str | Path | None = None,
    ids: Sequence[str | Path] = (),
    skip_missing: bool = False,
    size: int | None = None,
    url_base: str = URL_BASE,
    remove_archives: bool = False,
) -> tuple[str, dict]:
    """Write VOC2007, or images of it, into a folder in COCO's layout.

    Args:
        out: The folder, which gets the archives and ``VOCdevkit/``, too, without ``source``.
        source: ``VOCdevkit`` or ``VOC2007`` of which to make it; None to download.
        ids: Text files with one image id ('000005') a line. One: only these images, in the
            official splits. Two: those of the first for training, of the second for validation.
        skip_missing: Leave out images whose JPEG is not there.
        size: Longer side of every image in px; None to keep the images as they are.
        url_base: Where the archives are.
        remove_archives: Delete every archive once it is unpacked.

    Returns:
        'written' or 'already there', and counts by split.

    Raises:
        ConfigError: The download fails, or something in the source or ``ids`` is missing or
            damaged.
    """
    listed = [read_ids(Path(file)) for file in ids]
    made_of = {'data': 'voc2007', 'ids': [digest(some) for some in listed], 'size': size}
    if not skip_missing and (counts := already_there(out, made_of)) is not None:
        return 'already there', counts
    if source is None:
        prepare(ARCHIVES, out, url_base, remove_archives)
    folder = _find(Path(out if source is None else source))
    splits = _splits(folder, listed)
    if skip_missing:
        splits = {
            split: [id_ for id_ in some if _image(folder, id_).is_file()]
            for split, some in splits.items()
        }
        made_of['there'] = digest(id_ for some in splits.values() for id_ in some)
        if (counts := already_there(out, made_of)) is not None:
            return 'already there', counts
    label = partial(_labelled, folder)
    return 'written', write_folder(out, splits, label, CLASSES, made_of, size)


def read_annotation(file: str | Path) -> tuple[tuple[int, int], list[Box]]:
    """Width and height of the image, and the objects, that one of VOC's XML files tells.

    VOC's coordinates are pixels from 1 to the width, and the last one belongs to the object: one of
    ``xmin=1, xmax=3`` reaches from 0 to 3, and is 3 px wide.

    Raises:
        ConfigError: It is no such file, or an object is of no class of VOC, or not in the image.
    """
    with explained(f'{file} is no annotation of VOC'):
        root = ElementTree.parse(file).getroot()
        content = VOCDetection.parse_voc_xml(root)['annotation']
        size = int(content['size']['width']), int(content['size']['height'])
        boxes = []
        for thing in content['object']:
            if (name := thing['name']) not in CLASSES:
                raise ConfigError(f'{file} has an object of the class {name!r}, which VOC has not')
            x0, y0, x1, y1 = (float(thing['bndbox'][key]) for key in _CORNERS)
            # Rounding may put an edge a pixel out of the image.
            if not (0 <= x0 <= x1 <= size[0] + 1 and 0 <= y0 <= y1 <= size[1] + 1):
                raise ConfigError(
                    f'{file} has a {name} from {x0:g}, {y0:g} to {x1:g}, {y1:g}, which is no box '
                    'in the image'
                )
            difficult = thing.get('difficult') == '1'
            boxes.append(Box(CLASSES.index(name), (x0 - 1, y0 - 1, x1, y1), difficult))
    return size, boxes


_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


def _find(source: Path) -> Path:
    """The folder with ``Annotations`` and ``JPEGImages``."""
    for below in ('', 'VOC2007', 'VOCdevkit/VOC2007'):
        if (source / below / 'Annotations').is_dir():
            return source / below
    raise ConfigError(
        f'--source {source}: there is no VOC2007/Annotations in it; give the folder VOCdevkit'
    )


def _splits(folder: Path, listed: Sequence[list[str]]) -> dict[str, list[str]]:
    if len(listed) == 2:
        if both := set(listed[0]) & set(listed[1]):
            raise ConfigError(f'--ids: both files list {min(both)}, which can be in one split only')
        return dict(zip(_OFFICIAL, listed, strict=True))
    splits = {}
    for split, official in _OFFICIAL.items():
        file = folder / 'ImageSets' / 'Main' / f'{official}.txt'
        if not file.is_file():
            raise ConfigError(
                f'there is no {file}: get both archives of VOC2007, or give two files to --ids'
            )
        splits[split] = file.read_text().split()
    if listed:
        (chosen,) = map(set, listed)
        if unknown := chosen.difference(*splits.values()):
            raise ConfigError(f'--ids: {min(unknown)} is in neither of the official splits')
        splits = {split: [i for i in some if i in chosen] for split, some in splits.items()}
    return splits


def _image(folder: Path, id_: str) -> Path:
    return folder / 'JPEGImages' / f'{id_}.jpg'


def _labelled(folder: Path, id_: str) -> Labelled:
    annotation, image = folder / 'Annotations' / f'{id_}.xml', _image(folder, id_)
    for file in (annotation, image):
        if not file.is_file():
            raise ConfigError(f'there is no {file}: unpack the archives again')
    told, boxes = read_annotation(annotation)
    if (size := image_size(image)) != told:
        shapes = ['×'.join(map(str, of)) for of in (size, told)]
        raise ConfigError(
            f'{image} has {shapes[0]} pixels, and {shapes[1]} in its annotation: its boxes would '
            'be wrong, so use the original image'
        )
    return Labelled(image, image.name, size, boxes)
