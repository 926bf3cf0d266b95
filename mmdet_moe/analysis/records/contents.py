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
    """The images."""

    index: np.ndarray  #: int32 (i,), in the data set
    size: np.ndarray  #: int32 (i, 2), height and width in px


@dataclass
class BoxRecords:
    """What a detector found."""

    image: np.ndarray  #: int32 (d,), index in the data set
    box: np.ndarray  #: float32 (d, 4), xyxy in px of the original image
    score: np.ndarray  #: float32 (d,)
    label: np.ndarray  #: int32 (d,)


@dataclass
class DetectionRecords(BoxRecords):
    """What a detector found, and where it comes from."""

    level: np.ndarray  #: int32 (d,), pyramid level; -1 where unknown
    #: int64 (d,), row of its object, or what :mod:`~mmdet_moe.analysis.statistics.matching` says
    match: np.ndarray


@dataclass
class ObjectRecords:
    """What there is to find."""

    image: np.ndarray  #: int32 (o,), index in the data set
    box: np.ndarray  #: float32 (o, 4), xyxy in px of the original image
    label: np.ndarray  #: int32 (o,)
    crowd: np.ndarray  #: bool (o,)
    level: np.ndarray  #: int32 (o,), the level of most of its anchors or RoIs; -1 without


@dataclass
class ClassRecords:
    """What a classifier says of the images."""

    label: np.ndarray  #: int32 (i,), the true class
    prediction: np.ndarray  #: int32 (i,)
    score: np.ndarray  #: float32 (i,), of the predicted class, in 0..1
    true_score: np.ndarray  #: float32 (i,), of the true class
    cluster: np.ndarray  #: int32 (i,), the hidden cluster; -1 where there are none


@dataclass
class ChangedClassRecords:
    """What a classifier says of the images with each intervention."""

    prediction: np.ndarray  #: int32 (i, interventions)


@dataclass
class DecisionRecords:
    """Decisions of a layer, at most so many of an image, drawn at random."""

    image: np.ndarray  #: int32 (n,), index in the data set
    unit: np.ndarray  #: int64 (n,)
    level: np.ndarray  #: int32 (n,), pyramid level, or index of the map
    #: float32 (n, 2), x and y relative to the image; NaN without a place of its own
    centre: np.ndarray
    weights: np.ndarray  #: float32 (n, E), rows sum to 1


@dataclass
class LinkRecords:
    """Which decisions of a layer stand behind each object (a classifier's images are objects)."""

    owner: np.ndarray  #: int64 (n,), row of the object
    unit: np.ndarray  #: int64 (n,)
    level: np.ndarray  #: int32 (n,), of the object's places there; -1 of a classifier
    #: float64 (n,), the part of the object that is the decision's; 1 for each object
    share: np.ndarray
    weights: np.ndarray  #: float32 (n, E)


@dataclass
class OriginRecords:
    """The decision of a layer behind each detection."""

    unit: np.ndarray  #: int64 (d,), -1 where unknown
    weights: np.ndarray  #: float32 (d, E), NaN there


@dataclass
class ControlRecords:
    """Decisions as :mod:`~mmdet_moe.analysis.controls` see them: all that a layer's other records
    name, by ascending unit.

    D draws, V logits; both 0 of a layer with one expert.
    """

    unit: np.ndarray  #: int64 (n,)
    level: np.ndarray  #: int32 (n,), of the decision
    logits: np.ndarray  #: float32 (n, D, V), of routers with random weights


@dataclass
class LayerRecords:
    """What one layer did."""

    decisions: DecisionRecords
    links: LinkRecords
    controls: ControlRecords


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
    found = {name: from_arrays(kind_of_part(kind, name), parts[name]) for name in parts}
    return [found[str(i)] for i in range(len(found))] if get_origin(kind) is list else kind(**found)


def kind_of_part(kind: type, name: str) -> type:
    """Of a field of records, or of an item of a list of them, by name or number."""
    if get_origin(kind) is list:
        return get_args(kind)[0]
    return next(field.type for field in fields(kind) if field.name == name)
