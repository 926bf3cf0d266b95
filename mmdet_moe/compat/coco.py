"""COCO annotation files that other programs wrote: what can be mended without guessing."""

import json
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any


def read_coco(path: str) -> tuple[Any, list[str]]:
    """The content of an annotation file, mended, and what was.

    Boxes without ``iscrowd`` are no crowds, those without ``area`` have that of their box, and a
    byte-order mark in front is left out. Where an annotation has no number for an ``id``, or 0, all
    are numbered anew: COCO's evaluation takes the id 0 of a matched object for no match.

    Raises:
        ValueError: It is not JSON.
    """
    data = Path(path).read_bytes()
    content = json.loads(data)  # decides on the encoding by the first bytes
    mended = ['leaving out its byte-order mark'] if data.startswith(b'\xef\xbb\xbf') else []
    boxes = list(boxes_of(content))
    for key, what, value in (
        ('iscrowd', 'iscrowd=0', lambda box: 0),
        ('area', 'the area of the box', lambda box: box['bbox'][2] * box['bbox'][3]),
    ):
        missing = [box for box in boxes if key not in box and is_box(box['bbox'])]
        for box in missing:
            box[key] = value(box)
        if missing:
            mended.append(f'giving {len(missing)} annotations {what}')
    ids = [box.get('id') for box in boxes]
    given = [id_ for id_ in ids if isinstance(id_, int | float)]
    if (0 in given or len(given) < len(ids)) and len(set(given)) == len(given):
        for number, box in enumerate(boxes, 1):
            box['id'] = number
        mended.append('numbering its annotations from 1')
    return content, mended


def boxes_of(content: Any) -> Iterator[dict]:
    """The annotations of boxes in an annotation file, which may be of another kind."""
    annotations = content.get('annotations') if isinstance(content, dict) else None
    for annotation in annotations if isinstance(annotations, list) else ():
        if isinstance(annotation, dict) and 'bbox' in annotation:
            yield annotation


def is_box(bbox: Any) -> bool:
    """Whether it is a list of four numbers."""
    return isinstance(bbox, list) and len(bbox) == 4 and {*map(type, bbox)} <= {int, float}


def mend(module: ModuleType) -> None:
    """Make MMDetection's ``COCO`` read files by :func:`read_coco`, in data sets and metrics."""
    theirs = module.COCO.__init__

    @wraps(theirs)
    def __init__(self: Any, annotation_file: str | None = None) -> None:
        theirs(self)
        if annotation_file is not None:
            self.dataset, _ = read_coco(annotation_file)
            self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    module.COCO.__init__ = __init__
