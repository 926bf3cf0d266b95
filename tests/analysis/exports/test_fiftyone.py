"""What FiftyOne is given, parsed back: every value where the schema says, with its type."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdet_moe.analysis.exports import write_fiftyone
from mmdet_moe.analysis.statistics.matching import KINDS
from mmdet_moe.analysis.statistics.outcomes import Outcomes

NAN = np.nan
TYPES = {
    'ObjectIdField': dict, 'StringField': str, 'FloatField': float, 'IntField': int,
    'ListField': list, 'EmbeddedDocumentField': dict,
}  # fmt: skip


class Images:
    """Three images of 100 × 200 px, the last of which is no file."""

    def __len__(self):
        return 3

    def image_size(self, index):
        return 100, 200

    chosen = (5, 6, 8)  # of a larger data set

    def path(self, index):
        return [f'{index}.jpg', 's3://bucket/1.jpg', None][index]

    def image(self, index):
        return np.full((100, 200, 3), (255, 0, 10), np.uint8)


def outcomes(**changes):
    columns = {
        'image': np.array([0, 0, 1], np.int32),
        'is_detection': np.array([False, True, False]),
        'box': np.array([[10, 20, 30, 60], [12, 20, 30, 60], [0, 0, 5, 5]], np.float32),
        'label': np.array([1, 1, -1], np.int32),
        'true_label': np.array([1, 1, 0], np.int32),
        'score': np.array([0.75, 0.75, NAN], np.float32),
        'kind': np.array([KINDS.index(k) for k in ('correct', 'correct', 'missed')], np.uint8),
        'partner': np.array([1, -1, 0], np.int32),
        'iou': np.array([0.5, 0.5, NAN], np.float32),
        'loss': np.array([0.625, 0.625, 1], np.float32),
        'size': np.array([28, 27, 5], np.float32),
        'level': np.array([1, 1, -1], np.int32),
        'weights': {
            'head.cls-moe': np.array([[0.25, 0.75], [0.5, 0.5], [NAN, NAN]], np.float32),
            'head.cls_moe': np.array([[1, 0], [1, 0], [0, 1]], np.float32),
        },
        **changes,
    }
    return Outcomes(**columns)


def written(folder, made):
    write_fiftyone(Images(), made, ['cat', 'dog'], folder)
    metadata = json.loads((folder / 'metadata.json').read_text())
    return metadata, json.loads((folder / 'samples.json').read_text())['samples']


def check(value, fields):
    """A document against the fields of its schema."""
    known = {field['db_field']: field for field in fields}
    for key, entry in value.items():
        if key == '_cls':
            continue
        field = known[key]
        kind = field['ftype'].rpartition('.')[2]
        assert isinstance(entry, TYPES[kind]), key
        if kind == 'EmbeddedDocumentField':
            assert entry['_cls'] == field['embedded_doc_type'].rpartition('.')[2]
            check(entry, field['fields'])
        elif kind == 'ListField' and field['embedded_doc_type']:
            for part in entry:
                assert part['_cls'] == field['embedded_doc_type'].rpartition('.')[2]
                check(part, field['fields'])


def test_detector(tmp_path):
    metadata, samples = written(tmp_path / 'mine', outcomes())
    assert metadata['name'] == 'mine'
    for sample in samples:
        check(sample, metadata['sample_fields'])
    first, second, third = samples
    assert Path(first['filepath']) == Path('0.jpg').absolute()
    assert second['filepath'] == 's3://bucket/1.jpg'
    assert [sample['index'] for sample in samples] == [5, 6, 8]
    assert third['filepath'].endswith('000008.png')
    (truth,), (found,) = (first[n]['detections'] for n in ('ground_truth', 'predictions'))
    assert truth['bounding_box'] == pytest.approx([10 / 200, 20 / 100, 20 / 200, 40 / 100])
    assert {k: truth[k] for k in ('label', 'kind', 'level', 'loss', 'partner_iou')} == {
        'label': 'dog', 'kind': 'correct', 'level': 1, 'loss': 0.625, 'partner_iou': 0.5,
    }  # fmt: skip
    # Two names that would be the same field.
    assert (truth['head_cls_moe_expert'], truth['head_cls_moe_weight']) == ('e1', 0.75)
    assert truth['head_cls_moe_1_expert'] == 'e0'
    assert found['confidence'] == 0.75
    (missed,) = second['ground_truth']['detections']
    assert (missed['label'], missed['kind'], missed['loss']) == ('cat', 'missed', 1)
    for unknown in ('confidence', 'partner_iou', 'level', 'head_cls_moe_expert'):
        assert unknown not in missed
    # An image without anything, and without a file of its own.
    assert third['ground_truth']['detections'] == third['predictions']['detections'] == []
    image = cv2.imread(str(tmp_path / 'mine' / third['filepath']))
    assert image[0, 0].tolist() == [10, 0, 255]
    documents = [*samples, truth, found, missed]
    ids = [document['_id']['$oid'] for document in documents]
    assert len(set(ids)) == len(ids) == 6
    assert all(len(bytes.fromhex(i)) == 12 for i in ids)


def test_classifier(tmp_path):
    made = outcomes(
        image=np.arange(3, dtype=np.int32), is_detection=np.zeros(3, bool),
        size=np.full(3, NAN, np.float32), level=np.full(3, -1, np.int32),
        label=np.array([1, 0, 0], np.int32), kind=np.array([0, 1, 0], np.uint8),
        true_label=np.array([1, 1, 0], np.int32),
    )  # fmt: skip
    metadata, samples = written(tmp_path, made)
    for sample in samples:
        check(sample, metadata['sample_fields'])
    assert [s['ground_truth']['label'] for s in samples] == ['dog', 'dog', 'cat']
    assert [s['prediction']['label'] for s in samples] == ['dog', 'cat', 'cat']
    assert samples[1]['prediction']['kind'] == 'classification'
    assert samples[2]['prediction']['head_cls_moe_1_expert'] == 'e1'
