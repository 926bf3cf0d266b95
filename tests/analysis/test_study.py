"""What the records say of images of several sizes, and of layers that not every level passes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import BOXES, MOE_NECK, SIZES, build_detr, build_rcnn, build_single, make_batch
from torch import nn

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.data import Objects
from mmdet_moe.analysis.recorder import Recorder
from mmdet_moe.analysis.records.contents import DetectorRecords, from_arrays, to_arrays
from mmdet_moe.analysis.statistics.outcomes import outcomes_of
from mmdet_moe.analysis.study import Study
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MoELayer, add_experts


class Data:
    """The objects of the tiny batch."""

    def objects(self, index):
        boxes = np.array(BOXES[index % 4], np.float32).reshape(-1, 4)
        count = len(boxes)
        return Objects(boxes, np.arange(count), np.ones(count), np.zeros(count, bool))


@pytest.fixture
def recorded(randomise):
    model = randomise(build_single('retina', neck=MOE_NECK)).eval()
    with Tracer(model) as tracer:
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
        places = [
            tracer.object_places(i, meta.metainfo, torch.tensor(BOXES[i]).reshape(-1, 4))
            for i, meta in enumerate(tracer.predict(make_batch()))
        ]
    return recorder.take(), places, list(tracer.layers)


def test_columns_are_as_documented(recorded):
    """Types, and that the file gives back what it was given."""
    records, _, names = recorded
    arrays = to_arrays(records)
    types = {
        'images': {'index': 'int32', 'size': 'int32'},
        'detections': {
            'image': 'int32', 'box': 'float32', 'score': 'float32', 'label': 'int32',
            'level': 'int32', 'match': 'int64',
        },
        'objects': {
            'image': 'int32', 'box': 'float32', 'label': 'int32', 'crowd': 'bool',
            'level': 'int32',
        },
    }  # fmt: skip
    for number in range(len(names)):
        types[f'layers/{number}/decisions'] = {
            'image': 'int32', 'unit': 'int64', 'level': 'int32', 'centre': 'float32',
            'weights': 'float32',
        }  # fmt: skip
        types[f'layers/{number}/links'] = {
            'owner': 'int64', 'unit': 'int64', 'level': 'int32', 'share': 'float64',
            'weights': 'float32',
        }  # fmt: skip
        types[f'layers/{number}/controls'] = {
            'unit': 'int64', 'level': 'int32', 'logits': 'float32',
        }  # fmt: skip
        types[f'layers/{number}/detections'] = {'unit': 'int64', 'weights': 'float32'}
    expected = {f'{kind}/{name}': t for kind, of in types.items() for name, t in of.items()}
    assert {name: array.dtype.name for name, array in arrays.items()} == expected
    for kind, of in types.items():
        assert len({len(arrays[f'{kind}/{name}']) for name in of}) == 1
    again = from_arrays(DetectorRecords, arrays)
    assert again.layers[1].links.share is records.layers[1].links.share
    assert again.detections.match is records.detections.match


def test_positions_of_decisions_are_those_on_the_image(recorded):
    """The batch is padded to 64 x 96 px; what lies on padding has no position."""
    records, _, _ = recorded
    for level in range(3):
        found = records.layers[level].decisions.centre.reshape(3, 4, 2)
        for image, (height, width) in enumerate(SIZES):
            for patch, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                rows, columns = 8 >> level, 12 >> level
                bounds = [(k * rows // 2, k * columns // 2) for k in range(3)]
                y = (bounds[row][0] + bounds[row + 1][0]) / 2 * 64 / rows / height
                x = (bounds[column][1] + bounds[column + 1][1]) / 2 * 96 / columns / width
                expected = [x, y] if x < 1 and y < 1 else [np.nan, np.nan]
                np.testing.assert_allclose(found[image, patch], expected, atol=1e-6)
    assert np.isnan(records.layers[0].decisions.centre).any()


def test_level_of_an_object_is_that_of_most_of_its_anchors(recorded):
    """Whichever layers there are: each of the neck sees one level alone."""
    records, places, names = recorded
    expected = []
    for image, (held, owner) in enumerate(places):
        for number in range(len(BOXES[image])):
            levels = held.level[owner == number].tolist()
            most = max(map(levels.count, levels))
            expected.append({level for level in levels if levels.count(level) == most})
    levels = records.objects.level.tolist()
    assert all(a in b for a, b in zip(levels, expected, strict=True))
    outcomes = outcomes_of([records], names, 0.0)
    objects = ~outcomes.is_detection
    assert outcomes.level[objects].tolist() == levels
    assert outcomes.image[objects].tolist() == [4, 4, 4, 6]


def test_shares_of_an_object_sum_to_one(recorded):
    records, _, names = recorded
    for number in range(len(names)):
        links = records.layers[number].links
        sums = np.bincount(links.owner, links.share)
        np.testing.assert_allclose(sums[np.unique(links.owner)], 1)
        images = records.objects.image[links.owner]
        assert (links.unit >> 28 == images).all()
        assert set(links.level.tolist()) <= {number}


def test_batches_are_told_apart(randomise):
    """Two batches in one file: rows of objects are those of the file."""
    model = randomise(build_single('moe retina')).eval()
    found = []
    with Tracer(model) as tracer:
        for batches in ([[0, 1, 2]], [[0], [1, 2]]):
            recorder = Recorder(tracer, Data())
            for indices in batches:
                batch = make_batch()
                batch = {key: [values[i] for i in indices] for key, values in batch.items()}
                # All padded alike, wherever they are.
                for sample in batch['data_samples']:
                    sample.set_metainfo({'seen': True})
                model.data_preprocessor.pad_size_divisor = 96
                recorder.add(indices, tracer.predict(copy.deepcopy(batch)))
            found.append(to_arrays(recorder.take()))
    for name in found[0]:
        if not name.endswith(('weights', 'detections/box', 'detections/score')):
            a, b = found[0][name], found[1][name]
            if 'decisions' in name or 'links' in name:  # other orders of levels and images
                a, b = np.sort(a, axis=0), np.sort(b, axis=0)
            np.testing.assert_allclose(a, b, err_msg=name)


DECODER, ENCODER = 'decoder.layers.1.ffn.layers', 'encoder.layers.0.ffn.layers'


@pytest.mark.parametrize('kind', ['detr', 'dino'])
def test_objects_of_a_transformer_are_linked_to_their_queries(kind, randomise):
    """One query for each object; the encoder takes part where a token proposed it."""
    model = randomise(build_detr(kind, (DECODER, ENCODER))).eval()
    with Tracer(model) as tracer:
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
    records = recorder.take()
    decoder, encoder = (
        records.layers[list(tracer.layers).index(name)] for name in (DECODER, ENCODER)
    )
    has_token = kind == 'dino'
    assert sorted(decoder.links.owner) == [0, 1, 2, 3]
    assert (decoder.detections.unit >= 0).all()
    assert sorted(encoder.links.owner) == [0, 1, 2, 3] * has_token
    assert ((encoder.detections.unit >= 0) == has_token).all()
    assert ((records.objects.level >= 0) == has_token).all()
    tokens = (96 + 24 + 6 + 2 if has_token else 6) * 3
    assert encoder.decisions.level.shape == (tokens,)


def test_decisions_of_unknown_images_are_refused():
    """Such as windows of images: nobody can tell which belongs to which image."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MoELayer(LinearExperts(4, 4, 3), 3, 2, in_channels=4, granularity='token')

        def forward(self, inputs, mode):
            self.layer(inputs.flatten(0, 1))
            return [SimpleNamespace()] * len(inputs)

    with Tracer(Windows().eval()) as tracer:
        tracer.predict({'inputs': torch.randn(2, 5, 3, 4)}, preprocessed=True)
        with pytest.raises(ConfigError, match=r'"layer" decides on 10 inputs .* has 2 images'):
            tracer.decisions('layer', 2)


def test_pixels_of_a_factorised_layer(randomise):
    """The coefficients at the pixel of the lateral that feeds a detection's level."""
    model = build_single('retina')
    path = 'neck.lateral_convs.0.conv'
    add_experts(model, [dict(at=path, type='mmdet_moe.CPMuMoE', num_experts=(2, 3), rank=4)])
    layer = randomise(model).eval().get_submodule(path)
    inputs = []
    handle = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0]))
    with Tracer(model) as tracer:
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
    handle.remove()
    assert not layer._observers
    (records,) = recorder.take().layers
    images, _, height, width = inputs[-1].shape
    one, two = layer.coefficients(inputs[-1].permute(0, 2, 3, 1).reshape(-1, inputs[-1].shape[1]))
    expected = (one[:, :, None] * two[:, None]).flatten(1).detach().numpy()
    decisions = records.decisions
    assert decisions.weights.shape == (images * height * width, 6)
    np.testing.assert_allclose(decisions.weights, expected, atol=1e-6)
    known = records.detections.unit >= 0
    assert known.any()
    place = {unit: row for row, unit in enumerate(decisions.unit.tolist())}
    rows = [place[unit] for unit in records.detections.unit[known].tolist()]
    np.testing.assert_allclose(records.detections.weights[known], expected[rows], atol=1e-6)


def test_few_decisions_of_many_experts_are_kept(randomise, monkeypatch):
    """As many as have so many weights, whoever they are."""
    monkeypatch.setattr('mmdet_moe.analysis.recorder.MAX_WEIGHTS', 60)
    model = build_single('retina')
    experts = dict(type='mmdet_moe.CPMuMoE', num_experts=12, rank=2)
    add_experts(model, [dict(at='neck.lateral_convs.0.conv', **experts)])
    with Tracer(randomise(model).eval()) as tracer:
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
    (records,) = recorder.take().layers
    assert np.bincount(records.decisions.image).tolist() == [0, 0, 0, 0, 5, 5, 5]


def test_layers_keep_the_same_decisions(randomise, monkeypatch):
    """So that flows between them can be told: of maps of one size, the same of 9 patches."""
    monkeypatch.setattr('mmdet_moe.analysis.recorder.MAX_WEIGHTS', 16)
    model = build_single('retina')
    experts = dict(num_experts=4, granularity='patch', grid_size=3)
    paths = ('neck.lateral_convs.0.conv', 'neck.fpn_convs.0.conv')
    add_experts(model, [dict(at=path, **experts) for path in paths])
    with Tracer(randomise(model).eval()) as tracer:
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
    one, two = (layer.decisions for layer in recorder.take().layers)
    assert np.bincount(one.image).tolist() == [0, 0, 0, 0, 4, 4, 4]
    assert one.unit.tolist() == two.unit.tolist()


def test_a_head_that_the_first_images_do_not_need_has_its_place(randomise, tmp_path):
    """No masks are computed for images in which nothing is found."""
    path, mask_path = 'roi_head.bbox_head.shared_fcs.1', 'roi_head.mask_head.convs.0'
    paths = {path: {'in_channels': 12}, mask_path: {'in_channels': 8}}
    model = randomise(build_rcnn('mask_rcnn/mask-rcnn_r50_fpn_1x_coco', paths)).eval()
    model.roi_head.test_cfg.score_thr = 2.0

    class Images(Data):
        loader_cfg = {'batch_size': 3}
        is_whole = True

        def batches(self, batch_size, **_):
            yield make_batch(batch_size)

        def __len__(self):
            return 3

    study = Study(model, Images(), tmp_path, {}, 0.05)
    assert study.order == [path, mask_path]
    assert not study.left_out
