"""Export of an analysis as a data set that FiftyOne imports: experts beside every object.

The format is FiftyOne's own (``fiftyone.types.FiftyOneDataset``: ``metadata.json`` with the fields,
``samples.json`` with a document for each image), written without FiftyOne. To open it::

    import fiftyone as fo
    dataset = fo.Dataset.from_dir(dataset_dir=DIR, dataset_type=fo.types.FiftyOneDataset)
    fo.launch_app(dataset)

A sample of a detector has the fields ``ground_truth`` and ``predictions``, of a classifier
``ground_truth`` and ``prediction``. Each label carries ``kind`` (correct, or the type of error),
``level``, ``loss``, ``partner_iou`` and, for each layer, ``<layer>_expert`` (``'e2'``, the main
expert) and ``<layer>_weight``; what is unknown is left out. Points in names of layers become
underscores.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.statistics.matching import KINDS
from mmdet_moe.analysis.statistics.outcomes import Outcomes

#: Whose documents these are. Newer versions migrate them when they import, older ones refuse.
_VERSION = '1.0.0'
_FIELDS, _LABELS = 'fiftyone.core.fields', 'fiftyone.core.labels'


def write_fiftyone(
    data: AnalysisData, outcomes: Outcomes, classes: Sequence[str], folder: Path
) -> None:
    """Write the data set; each call replaces its files.

    Args:
        data: The images. Those that are no files are written as PNG into ``data/``.
        outcomes: What became of them, rows ascending by image.
        classes: Names of the labels.
        folder: Where to; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_detector = bool(np.isfinite(outcomes.size).any() or outcomes.is_detection.any())
    slugs = _slugs(list(outcomes.weights))
    borders = np.searchsorted(outcomes.image, np.arange(len(data) + 1))
    samples = []
    for index, place in enumerate(data.chosen):
        height, width = data.image_size(index)
        rows = range(borders[index], borders[index + 1])
        labels = {'ground_truth': [], 'predictions': []}
        for row in rows:
            if is_detector:
                name = 'predictions' if outcomes.is_detection[row] else 'ground_truth'
                label = _label(outcomes, row, classes, slugs, outcomes.counted_label[row])
                x0, y0, x1, y1 = outcomes.box[row].tolist()
                box = [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]
                labels[name].append({'_cls': 'Detection', **label, 'bounding_box': box})
        sample = {
            '_id': _oid(1, place),
            '_media_type': 'image',
            '_rand': (place * 0.6180339887498949) % 1,
            'filepath': _path(data, index, folder),
            'tags': [],
            'metadata': {'_cls': 'ImageMetadata', 'width': width, 'height': height},
            'index': place,
        }
        if is_detector:
            sample |= {n: {'_cls': 'Detections', 'detections': of} for n, of in labels.items()}
        elif len(rows):
            row = rows[0]
            truth = {'_id': _oid(3, row), 'tags': [], 'label': classes[outcomes.true_label[row]]}
            label = _label(outcomes, row, classes, slugs, outcomes.label[row])
            sample |= {
                'ground_truth': {'_cls': 'Classification', **truth},
                'prediction': {'_cls': 'Classification', **label},
            }
        samples.append(sample)
    metadata = {
        'name': folder.name,
        'version': _VERSION,
        'media_type': 'image',
        'tags': [],
        'info': {},
        'sample_fields': _schema(is_detector, list(slugs.values())),
        'default_classes': list(classes),
    }
    for name, content in (('metadata', metadata), ('samples', {'samples': samples})):
        text = json.dumps(content, allow_nan=False, separators=(',', ':'))
        write_file(folder / f'{name}.json', text.encode())


def _slugs(layers: Sequence[str]) -> dict[str, str]:
    """Names of fields, which start with a letter and hold no points."""
    slugs: dict[str, str] = {}
    for name in layers:
        slug = re.sub(r'\W+', '_', name)
        slugs[name] = slug if slug not in slugs.values() else f'{slug}_{len(slugs)}'
    return slugs


def _label(
    outcomes: Outcomes, row: int, classes: Sequence[str], slugs: dict[str, str], label: int
) -> dict[str, Any]:
    known = {
        'confidence': float(outcomes.score[row]),
        'loss': float(outcomes.loss[row]),
        'partner_iou': float(outcomes.iou[row]),
        'level': int(outcomes.level[row]) if outcomes.level[row] >= 0 else math.nan,
    }
    for name, slug in slugs.items():
        weights = outcomes.weights[name][row]
        if not np.isnan(weights).any():
            main = int(weights.argmax())
            known |= {f'{slug}_expert': f'e{main}', f'{slug}_weight': float(weights[main])}
    return {
        '_id': _oid(2, row),
        'tags': [],
        'label': classes[label],
        'kind': KINDS[outcomes.kind[row]],
        **{k: v for k, v in known.items() if not (isinstance(v, float) and math.isnan(v))},
    }


def _oid(kind: int, number: int) -> dict[str, str]:
    """An ObjectId of MongoDB's: 24 hexadecimal digits, the same at every export."""
    return {'$oid': f'{kind:08x}{number:016x}'}


def _path(data: AnalysisData, index: int, folder: Path) -> str:
    path = data.path(index)
    if path is not None:
        return path if '://' in path else str(Path(path).absolute())
    name = Path('data') / f'{data.chosen[index]:06d}.png'
    (folder / 'data').mkdir(exist_ok=True)
    image = np.ascontiguousarray(data.image(index)[..., ::-1])
    write_file(folder / name, cv2.imencode('.png', image)[1].tobytes())
    return name.as_posix()


def _schema(is_detector: bool, slugs: Sequence[str]) -> list[dict]:
    """The fields of a sample, as FiftyOne's ``SampleFieldDocument``."""
    of_label = [
        _field('id', 'ObjectIdField', db_field='_id'),
        _field('tags', 'ListField', subfield='StringField'),
        _field('label', 'StringField'),
        _field('confidence', 'FloatField'),
    ]
    ours = [
        _field('kind', 'StringField'),
        _field('level', 'IntField'),
        _field('loss', 'FloatField'),
        _field('partner_iou', 'FloatField'),
        *(_field(f'{slug}_expert', 'StringField') for slug in slugs),
        *(_field(f'{slug}_weight', 'FloatField') for slug in slugs),
    ]
    if is_detector:
        box = _field('bounding_box', 'ListField', subfield='FloatField')
        detections = {
            **_field('detections', 'ListField', subfield='EmbeddedDocumentField'),
            'embedded_doc_type': f'{_LABELS}.Detection',
            'fields': [*of_label, box, *ours],
        }
        labels = [
            _embedded(name, f'{_LABELS}.Detections', [detections])
            for name in ('ground_truth', 'predictions')
        ]
    else:
        kind = f'{_LABELS}.Classification'
        labels = [
            _embedded('ground_truth', kind, of_label),
            _embedded('prediction', kind, [*of_label, *ours]),
        ]
    sizes = [_field(name, 'IntField') for name in ('size_bytes', 'width', 'height', 'num_channels')]
    mime = _field('mime_type', 'StringField')
    return [
        _field('id', 'ObjectIdField', db_field='_id'),
        _field('filepath', 'StringField'),
        _field('tags', 'ListField', subfield='StringField'),
        _embedded('metadata', 'fiftyone.core.metadata.ImageMetadata', [*sizes, mime]),
        _field('_media_type', 'StringField'),
        _field('_rand', 'FloatField'),
        _field('_dataset_id', 'ObjectIdField'),
        _field('created_at', 'DateTimeField', read_only=True),
        _field('last_modified_at', 'DateTimeField', read_only=True),
        _field('index', 'IntField'),
        *labels,
    ]


def _field(
    name: str,
    kind: str,
    subfield: str | None = None,
    db_field: str | None = None,
    read_only: bool = False,
) -> dict:
    return {
        'name': name,
        'ftype': f'{_FIELDS}.{kind}',
        'embedded_doc_type': None,
        'subfield': subfield and f'{_FIELDS}.{subfield}',
        'fields': [],
        'db_field': db_field or name,
        'description': None,
        'info': None,
        'read_only': read_only,
    }


def _embedded(name: str, kind: str, fields: Sequence[dict]) -> dict:
    document = _field(name, 'EmbeddedDocumentField')
    return {**document, 'embedded_doc_type': kind, 'fields': list(fields)}
