"""COCO annotation files: read and checked for what no training could use, and counted."""

import gc
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdet_moe.compat.coco import boxes_of, is_box, read_coco
from mmdet_moe.compat.distributed import note
from mmdet_moe.errors import ConfigError

#: COCO's size bins, by the area.
SIZES = ('small', 'medium', 'large')
#: :func:`fate` of what is trained.
USED = 'used'
CROWD = 'marked with `iscrowd`'
IGNORED = 'marked with `ignore`'
TOO_SMALL = 'smaller than a pixel or outside of the image'


@dataclass(frozen=True)
class CocoFile:
    """What checks need of an annotation file.

    Attributes:
        categories: Names, in the file's order.
        images: By id, the name of the file, and width and height in px.
        boxes: How many annotations there are, by their category (None: not in the file) and by
            their :func:`fate`.
        showing: The ids of the images with an annotation of each category.
        has_annotations: Whether there is a list of them.
    """

    categories: tuple[str, ...]
    images: dict[Any, tuple[str, tuple[int, int]]]
    boxes: Counter[tuple[str | None, str]]
    showing: dict[str | None, set]
    has_annotations: bool


def read_coco_file(path: str, where: str) -> tuple[dict, CocoFile]:
    """The content of an annotation file, mended by ``read_coco``, and its summary.

    Args:
        path: A file that exists.
        where: What messages begin with.

    Raises:
        ConfigError: It is no annotation file, or images, categories or annotations lack a key,
            share an id, have a box of other than 4 numbers, or something of a type that no training
            or no evaluation takes.
    """
    # The files have up to millions of small dicts, over which the collector would run for seconds.
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        content, mended = read_coco(path)
        for key in ('images', 'categories'):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise ConfigError(f'{where} is not a COCO annotation file, it has no `{key}`')
        coco = _summary(content, where)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{where} is not JSON, or an incomplete copy of it ({error})') from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f'{where} has an entry that is of no type that COCO has there ({error})'
        ) from error
    finally:
        if gc_was_on:
            gc.enable()
    if mended:
        note(f'{where} is read by {" and ".join(mended)}')
    return content, coco


def _summary(content: dict, where: str) -> CocoFile:
    images = {}
    for image in content['images']:
        given = image if isinstance(image, dict) else {}
        if missing := [key for key in ('id', 'file_name', 'height', 'width') if key not in given]:
            raise ConfigError(f'{where} has no `{missing[0]}` for the image {image}; add it')
        size = image['width'], image['height']
        if (
            not isinstance(image['file_name'], str)
            or not isinstance(image['id'], int | float | str)
            or not all(isinstance(s, int | float) for s in size)
        ):
            raise ConfigError(
                f'{where} has {image} among its images, whose file_name must be text, id a number '
                'or text, and width and height numbers'
            )
        if image['id'] in images:
            raise ConfigError(
                f'{where} lists two images with the id {image["id"]}; give each its own'
            )
        images[image['id']] = image['file_name'], size
    for category in content['categories']:
        given = category if isinstance(category, dict) else {}
        if not isinstance(given.get('id'), int | float | str) or not isinstance(
            given.get('name'), str
        ):
            raise ConfigError(
                f'{where} has {category} among its categories, which must have an `id` that is a '
                'number or text, and a `name` that is text'
            )
    names = {category['id']: category['name'] for category in content['categories']}
    for kind, ids in (('images', images), ('categories', names)):
        if len({isinstance(id_, str) for id_ in ids}) > 1:  # which COCO's evaluation cannot sort
            raise ConfigError(
                f'{where} has numbers and texts for ids of its {kind}; give all of them numbers'
            )
    boxes, showing, ids = Counter(), defaultdict(set), set()
    for box in boxes_of(content):
        if missing := [key for key in ('image_id', 'category_id', 'id') if key not in box]:
            raise ConfigError(f'{where} has no `{missing[0]}` for the annotation {box.get("id")}')
        if box.get('id') in ids:
            raise ConfigError(
                f'{where} has two annotations with the id {box["id"]}; number them anew'
            )
        ids.add(box['id'])
        if not is_box(box['bbox']):
            raise ConfigError(
                f'{where} has bbox={box["bbox"]} for the annotation {box["id"]}, which must be '
                'four numbers, [x, y, width, height]; mend it or take it out'
            )
        if not isinstance(box['area'], int | float) or box['iscrowd'] not in (0, 1):
            raise ConfigError(
                f'{where} has area={box["area"]!r} and iscrowd={box["iscrowd"]!r} for the '
                f'annotation {box["id"]}, which must be a number, and 0 or 1'
            )
        try:
            name = names.get(box['category_id'])
            boxes[name, fate(box, images)] += 1
            showing[name].add(box['image_id'])
        except TypeError:
            raise ConfigError(
                f'{where} has image_id={box["image_id"]} and category_id={box["category_id"]} for '
                f'the annotation {box["id"]}, which must be ids of an image and of a category'
            ) from None
    return CocoFile(
        categories=tuple(names.values()),
        images=images,
        boxes=boxes,
        showing=showing,
        has_annotations=isinstance(content.get('annotations'), list),
    )


def without_box(content: Mapping) -> list:
    """Annotations of a file that lack a ``bbox``, though MMDetection would read it."""
    return [
        annotation
        for annotation in content['annotations']
        if not isinstance(annotation, Mapping)
        or not (annotation.get('ignore') or 'bbox' in annotation)
    ]


def fate(box: Mapping, images: Mapping[Any, tuple[str, tuple[int, int]]]) -> str:
    """What MMDetection makes of an annotation of a class it knows: :data:`USED`, or why not."""
    if box['image_id'] not in images:
        return 'of images that the file does not list'
    if box.get('ignore'):
        return IGNORED
    (x, y, w, h), (width, height) = box['bbox'], images[box['image_id']][1]
    # In this order of the numbers, a box of NaN is not inside either.
    is_inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    if not is_inside or box['area'] <= 0 or w < 1 or h < 1:
        return TOO_SMALL
    return CROWD if box['iscrowd'] else USED


def count_objects(content: Mapping[str, Any]) -> dict:
    """Count the content of an annotation file, crowds (``iscrowd``) left out.

    Returns:
        ``{'images': int, 'objects': int, 'sizes': {'small': int, 'medium': int, 'large': int},
        'classes': {name: int}}``.
    """
    objects = [box for box in boxes_of(content) if not box['iscrowd']]
    sizes = Counter(size_bin(box['area']) for box in objects)
    labels = Counter(box['category_id'] for box in objects)
    return {
        'images': len(content['images']),
        'objects': len(objects),
        'sizes': {name: sizes[name] for name in SIZES},
        'classes': {category['name']: labels[category['id']] for category in content['categories']},
    }


def size_bin(area: float) -> str:
    """COCO's size bin ('small', 'medium' or 'large') of an area in px²."""
    if area < 32**2:
        return 'small'
    return 'medium' if area <= 96**2 else 'large'
