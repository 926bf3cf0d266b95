"""What is recorded of a data set: columns of equally many rows, one dataclass for each kind.

Rows of objects are numbered within one set of records, which is what one file holds. A *unit* is
the number of a decision, different for all decisions that a layer makes on a data set.

Letters: i images, d detections, o objects, n rows, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_origin

import numpy as np

T = TypeVar('T')
Arrays = dict[str, np.ndarray]


@dataclass
class ImageRecords:
    """The images.

    Attributes:
        index: int32 (i,), in the data set.
        size: int32 (i, 2), height and width in px.
    """

    index: np.ndarray
    size: np.ndarray


@dataclass
class BoxRecords:
    """What a detector found.

    Attributes:
        image: int32 (d,), index in the data set.
        box: float32 (d, 4), xyxy in px of the original image.
        score: float32 (d,).
        label: int32 (d,).
    """

    image: np.ndarray
    box: np.ndarray
    score: np.ndarray
    label: np.ndarray


@dataclass
class DetectionRecords(BoxRecords):
    """What a detector found, and where it comes from.

    Attributes:
        level: int32 (d,), pyramid level; -1 where unknown.
        match: int64 (d,), the row of its object, or what
            :mod:`~mmdet_moe.analysis.statistics.matching` says.
    """

    level: np.ndarray
    match: np.ndarray


@dataclass
class ObjectRecords:
    """What there is to find.

    Attributes:
        image: int32 (o,), index in the data set.
        box: float32 (o, 4), xyxy in px of the original image.
        label: int32 (o,).
        crowd: bool (o,).
        level: int32 (o,), the level of most of its anchors or RoIs; -1 without.
    """

    image: np.ndarray
    box: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    level: np.ndarray


@dataclass
class ClassRecords:
    """What a classifier says of the images.

    Attributes:
        label: int32 (i,), the true class.
        prediction: int32 (i,).
        score: float32 (i,).
        cluster: int32 (i,), the hidden cluster; -1 where there are none.
    """

    label: np.ndarray
    prediction: np.ndarray
    score: np.ndarray
    cluster: np.ndarray


@dataclass
class DecisionRecords:
    """Decisions of a layer, at most so many of an image, drawn at random.

    Attributes:
        image: int32 (n,), index in the data set.
        unit: int64 (n,).
        level: int32 (n,), pyramid level, or index of the map.
        centre: float32 (n, 2), x and y relative to the image; NaN without a place of its own.
        weights: float32 (n, E), rows sum to 1.
    """

    image: np.ndarray
    unit: np.ndarray
    level: np.ndarray
    centre: np.ndarray
    weights: np.ndarray


@dataclass
class LinkRecords:
    """Which decisions of a layer stand behind each object. A classifier's images are its objects.

    Attributes:
        owner: int64 (n,), row of the object.
        unit: int64 (n,).
        level: int32 (n,), of the object's places there; -1 of a classifier.
        share: float64 (n,), the part of the object that is the decision's; 1 for each object.
        weights: float32 (n, E).
    """

    owner: np.ndarray
    unit: np.ndarray
    level: np.ndarray
    share: np.ndarray
    weights: np.ndarray


@dataclass
class OriginRecords:
    """The decision of a layer behind each detection.

    Attributes:
        unit: int64 (d,), -1 where unknown.
        weights: float32 (d, E), NaN there.
    """

    unit: np.ndarray
    weights: np.ndarray


@dataclass
class LayerRecords:
    """What one layer did."""

    decisions: DecisionRecords
    links: LinkRecords


@dataclass
class DetectorLayerRecords(LayerRecords):
    """What one layer of a detector did; ``detections`` has its rows."""

    detections: OriginRecords


@dataclass
class DetectorRecords:
    """What a detector did with some images."""

    images: ImageRecords
    detections: DetectionRecords
    objects: ObjectRecords
    layers: list[DetectorLayerRecords]


@dataclass
class ClassifierRecords:
    """What a classifier did with some images."""

    images: ImageRecords
    classes: ClassRecords
    layers: list[LayerRecords]


def concatenated(parts: Sequence[T]) -> T:
    """Records of one kind (or dicts or lists of them), one after the other."""
    return _each(np.concatenate, parts)


def select(records: T, rows: np.ndarray) -> T:
    """Some rows of records whose columns have equally many: those of a mask, or of indices."""
    return _each(lambda columns: columns[0][rows], [records])


def _each(function: Callable[[Sequence[np.ndarray]], np.ndarray], parts: Sequence[T]) -> T:
    first = parts[0]
    if isinstance(first, np.ndarray):
        return function(parts)
    if isinstance(first, list):
        return [_each(function, column) for column in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {name: _each(function, [part[name] for part in parts]) for name in first}
    return type(first)(**_each(function, [vars(part) for part in parts]))


def to_arrays(records: Any, path: str = '') -> Arrays:
    """Records, or a list of them, as arrays named by their fields: ``layers/0/links/unit``."""
    if isinstance(records, np.ndarray):
        return {path: records}
    named = enumerate(records) if isinstance(records, list) else vars(records).items()
    arrays = {}
    for name, value in named:
        arrays |= to_arrays(value, f'{path}/{name}' if path else str(name))
    return arrays


def from_arrays(kind: type[T], arrays: Arrays) -> T:
    """The inverse of :func:`to_arrays`.

    Args:
        kind: One of the classes here, or ``list[...]`` of one or of arrays.
        arrays: By name.
    """
    if kind is np.ndarray:
        return arrays['']
    parts: dict[str, Arrays] = {}
    for path, array in arrays.items():
        name, _, rest = path.partition('/')
        parts.setdefault(name, {})[rest] = array
    if get_origin(kind) is list:
        return [from_arrays(get_args(kind)[0], parts[str(i)]) for i in range(len(parts))]
    return kind(**{f.name: from_arrays(f.type, parts[f.name]) for f in fields(kind)})
