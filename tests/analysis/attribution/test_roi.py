"""Origins against every RoI decoded by hand."""

import copy
import math

import pytest
import torch
from by_hand import (
    cells_of,
    check_same,
    inputs_of,
    patch_weights,
    traced_weights,
    weights_by_hand,
)
from mmengine.structures import InstanceData
from tiny_models import (
    BOXES,
    CLASSES,
    build_faster,
    build_rcnn,
    gt_instances,
    make_batch,
    place,
    predict,
)
from torch import nn
from torchvision.ops import box_iou

from mmdet_moe.analysis.attribution import Tracer

# RoI heads ----------------------------------------------------------------------------------------


@torch.no_grad()
def every_roi(model, batch):
    """All RoIs (image and box) with the boxes and scores of every class in the original px."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    features = model.extract_feat(data['inputs'])
    proposals = model.rpn_head.predict(features, data['data_samples'], rescale=False)
    rois = torch.cat(
        [
            torch.cat([torch.full((len(p), 1), float(i)), p.bboxes], 1)
            for i, p in enumerate(proposals)
        ]
    )
    head = model.roi_head
    pooled = head.bbox_roi_extractor(features[:4], rois)
    scores, deltas = head.bbox_head(pooled)
    found = []
    for t, roi in enumerate(rois):
        meta = data['data_samples'][int(roi[0])].metainfo
        per_class = deltas[t].reshape(-1, 4)
        boxes = head.bbox_head.bbox_coder.decode(
            roi[None, 1:].repeat(len(per_class), 1), per_class, max_shape=meta['img_shape']
        )
        boxes = boxes / torch.tensor(list(meta['scale_factor']) * 2)
        found.append((boxes.expand(CLASSES, 4), scores[t].softmax(0)))
    return rois, pooled, found


@pytest.mark.parametrize('name', ['faster', 'faster, agnostic', 'faster, dense head'])
def test_detections_come_from_their_roi(name, make):
    model, batch = make(name), make_batch()
    rois, pooled, decoded = every_roi(model, batch)
    sides = [(64, 96)] * 3  # padded to the largest, which the divisor leaves as it is
    with Tracer(model) as tracer, torch.no_grad():
        assert tracer.num_levels == 4
        results = tracer.predict(copy.deepcopy(batch))
        count = 0
        for i, result in enumerate(results):
            detections = result.pred_instances
            places = tracer.detection_places(i, detections)
            for d in range(len(detections)):
                t, label = places.source[d].item(), detections.labels[d]
                boxes, scores = decoded[t]
                assert rois[t, 0] == i
                torch.testing.assert_close(boxes[label], detections.bboxes[d], atol=1e-3, rtol=0)
                torch.testing.assert_close(scores[label], detections.scores[d], atol=1e-6, rtol=0)
                # Only one RoI gives that box and score.
                same = [
                    u
                    for u, (b, s) in enumerate(decoded)
                    if rois[u, 0] == i
                    and (b[label] - detections.bboxes[d]).abs().max() < 1e-4
                    and (s[label] - detections.scores[d]).abs() < 1e-7
                ]
                assert t in same
                count += len(same) == 1
                side = ((rois[t, 3] - rois[t, 1]) * (rois[t, 4] - rois[t, 2])).sqrt()
                level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
                assert places.level[d] == level
                height, width = sides[i]
                assert places.x[d].item() == pytest.approx(
                    (rois[t, 1] + rois[t, 3]).item() / 2 / width, abs=1e-6
                )
                assert places.y[d].item() == pytest.approx(
                    (rois[t, 2] + rois[t, 4]).item() / 2 / height, abs=1e-6
                )
            if name == 'faster, dense head':
                continue
            layer = 'roi_head.bbox_head.shared_fcs'
            found, items, decisions = traced_weights(tracer, layer, places, 3)
            assert torch.equal(items, places.source)
            expected = weights_by_hand(tracer.layers[layer].router, pooled.mean((2, 3)))
            torch.testing.assert_close(found, expected[places.source], rtol=0, atol=1e-5)
            assert torch.equal(decisions.image, rois[:, 0].long())
            for image in range(3):
                mine = decisions.image == image
                assert decisions.code[mine].tolist() == list(range(int(mine.sum())))
        assert count > 20


def test_necks_of_faster_rcnn(make):
    """A RoI's features come from its own level of the neck."""
    model, batch = make('faster, dense head'), make_batch()
    maps = inputs_of(model, batch)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            for level in range(4):
                name = f'neck.fpn_convs.{level}'
                found, items, _ = traced_weights(tracer, name, places, 3)
                assert torch.equal(items >= 0, places.level == level)
                for d, (own, row, column) in enumerate(cells_of(places, sizes)):
                    if own == level:
                        height, width = sizes[level]
                        cell = min(row, height - 1), min(column, width - 1)
                        expected = patch_weights(tracer.layers[name], maps[name][0][i], 2, *cell)
                        torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)


def give_proposals(model, monkeypatch, boxes):
    """The RPN proposes these boxes, network px, for each image."""
    proposals = [
        InstanceData(
            bboxes=torch.tensor(b).reshape(-1, 4),
            scores=torch.ones(len(b)),
            labels=torch.zeros(len(b), dtype=torch.long),
        )
        for b in boxes
    ]
    monkeypatch.setattr(
        model.rpn_head, 'predict', lambda *_, **__: copy.deepcopy(proposals), raising=False
    )


NEAR = [[2.0, 6, 15, 40], [10, 2, 75, 60], [12.0, 4, 70, 62], [50, 30, 59, 50], [0, 0, 5, 5]]


def test_objects_of_an_roi_head_are_those_of_its_assigner(make, monkeypatch):
    model, batch = make('faster'), make_batch()
    proposals = (NEAR, NEAR, [])
    give_proposals(model, monkeypatch, proposals)
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        offset = 0
        for i, result in enumerate(results):
            boxes = torch.tensor(BOXES[i]).reshape(-1, 4)
            rois = torch.tensor(proposals[i]).reshape(-1, 4)
            expected = []
            for t, overlaps in enumerate(box_iou(rois, gt_instances(i).bboxes).tolist()):
                if overlaps and max(overlaps) >= 0.5:
                    expected.append((offset + t, overlaps.index(max(overlaps))))
            places, owner = tracer.object_places(i, result.metainfo, boxes)
            found = list(zip(places.source.tolist(), owner.tolist(), strict=True))
            assert found == expected
            offset += len(proposals[i])
            if i == 0:
                assert len(expected) == 4


@pytest.mark.parametrize('proposals', [([], NEAR, []), (NEAR, [], NEAR), ([], [], [])])
def test_images_without_proposals(proposals, make, monkeypatch):
    model, batch = make('faster'), make_batch()
    give_proposals(model, monkeypatch, proposals)
    expected = predict(model, batch)
    layer = 'roi_head.bbox_head.shared_fcs'
    with Tracer(model) as tracer:
        # What an earlier batch left must not be taken for this one's.
        give_proposals(model, monkeypatch, (NEAR, NEAR, NEAR))
        tracer.predict(make_batch())
        give_proposals(model, monkeypatch, proposals)
        results = tracer.predict(copy.deepcopy(batch))
        check_same(results, expected)
        decisions = tracer.decisions(layer, 3)
        total = sum(map(len, proposals))
        assert (decisions is None) == (total == 0)
        for i, result in enumerate(results):
            places = tracer.detection_places(i, result.pred_instances)
            assert len(places) == len(result.pred_instances)
            items = tracer.items(layer, places)
            assert (items >= 0).all()
            objects, owner = tracer.object_places(
                i, result.metainfo, torch.tensor(BOXES[i]).reshape(-1, 4)
            )
            if not proposals[i]:
                assert len(places) == len(objects) == len(owner) == 0
            if decisions is not None:
                assert (decisions.image[items] == i).all()


# Several stages, and masks ------------------------------------------------------------------------

CASCADE = 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco'
MASK = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco'
VECTORS = {'granularity': 'token'}
STAGES = [f'roi_head.bbox_head.{i}.shared_fcs' for i in range(3)]
EXPERTS = {
    CASCADE: {
        f'{STAGES[0]}.0': {'in_channels': 8 * 49, **VECTORS},
        f'{STAGES[2]}.1': {'in_channels': 12, **VECTORS},
        'roi_head.mask_head.0.convs.1': {'in_channels': 8},
    },
    MASK: {
        'roi_head.bbox_head.shared_fcs.1': {'in_channels': 12, **VECTORS},
        'roi_head.mask_head.convs.0': {'in_channels': 8},
    },
}


@torch.no_grad()
def every_roi_of_all_stages(model, batch):
    """The RoIs of each stage, the boxes (T, C, 4) in px of the images, and the scores (T, C)."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    samples, head = data['data_samples'], model.roi_head
    features = model.extract_feat(data['inputs'])
    proposals = model.rpn_head.predict(features, samples, rescale=False)
    image = torch.cat([torch.full((len(p),), float(i)) for i, p in enumerate(proposals)])
    boxes, scores, stages = torch.cat([p.bboxes for p in proposals]), [], []
    heads = head.bbox_head if hasattr(head, 'num_stages') else [head.bbox_head]
    for i, stage in enumerate(heads):
        extractor = head.bbox_roi_extractor[i] if len(heads) > 1 else head.bbox_roi_extractor
        stages.append(torch.cat([image[:, None], boxes], 1))
        score, delta = stage(extractor(features[:4], stages[-1]))
        scores.append(score)
        every = []
        for roi, deltas in zip(stages[-1], delta, strict=True):
            shape = samples[int(roi[0])].img_shape
            deltas = deltas.reshape(-1, 4)
            priors = roi[None, 1:].expand(len(deltas), 4)
            decoded = stage.bbox_coder.decode(priors, deltas, max_shape=shape)
            every.append(decoded.expand(CLASSES, 4))
        # Boxes that all classes share are the next stage's RoIs.
        boxes = torch.stack([decoded[0] for decoded in every])
    scale = torch.tensor([list(samples[int(i)].scale_factor) * 2 for i in image])
    scores = (sum(scores) / len(scores)).softmax(1)
    return stages, torch.stack(every) / scale[:, None], scores[:, :-1]


@pytest.mark.parametrize('name', EXPERTS)
def test_stages_and_masks(name, randomise):
    model = randomise(build_rcnn(name, EXPERTS[name])).eval()
    batch = make_batch()
    stages, boxes, scores = every_roi_of_all_stages(model, batch)
    inputs, expected = inputs_of(model, batch), predict(model, batch)
    with Tracer(model) as tracer, torch.no_grad():
        assert (tracer.knows_origins, tracer.num_levels) == (True, 4)
        results = tracer.predict(copy.deepcopy(batch))
        check_same(results, expected)
        first, alone, levels = 0, 0, set()
        for i, result in enumerate(results):
            found = result.pred_instances
            assert torch.equal(found.masks, expected[i].pred_instances.masks)
            places = tracer.detection_places(i, found)
            for d, label in enumerate(found.labels):
                roi = places.source[d]
                difference = (boxes[:, label] - found.bboxes[d]).abs().amax(1)
                difference += (scores[:, label] - found.scores[d]).abs()
                difference[stages[0][:, 0] != i] = 1e9
                assert difference[roi] < 1e-3
                alone += bool(difference.sort().values[1] > 1e-3)
                _, left, top, right, bottom = stages[-1][roi].tolist()
                assert places.x[d].item() == pytest.approx((left + right) / 2 / 96, abs=1e-5)
                assert places.y[d].item() == pytest.approx((top + bottom) / 2 / 64, abs=1e-5)
                side = ((right - left) * (bottom - top)) ** 0.5
                assert places.level[d] == min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
                levels.add(int(places.level[d]))
            for layer in EXPERTS[name]:
                (x,) = inputs[layer]
                is_mask = 'mask_head' in layer
                weights, items, decisions = traced_weights(tracer, layer, places, 3)
                if is_mask:
                    x = x.mean((2, 3))
                    assert items.tolist() == list(range(first, first + len(found)))
                else:
                    assert torch.equal(items, places.source)
                by_hand = weights_by_hand(tracer.layers[layer].router, x)
                torch.testing.assert_close(weights, by_hand[items], rtol=0, atol=1e-5)
                assert len(decisions.image) == len(x)
                assert (decisions.image[items] == i).all()
                numbers = decisions.code[decisions.image == i].tolist()
                assert numbers == list(range(len(numbers)))
            first += len(found)
            objects, owner = tracer.object_places(
                i, result.metainfo, torch.tensor(BOXES[i]).reshape(-1, 4)
            )
            assert len(objects) == len(owner)
            assert (tracer.items(next(iter(EXPERTS[name])), objects) >= 0).all()
            mask_layer = list(EXPERTS[name])[-1]
            assert (tracer.items(mask_layer, objects) == -1).all()
    assert alone > first / 2 > 10


def test_patches_of_an_roi_are_no_decision_for_its_box(randomise):
    """All of them make it; they are shown, but none of them is picked."""
    name = 'roi_head.bbox_head.shared_convs.0'
    model = build_faster()
    head = model.roi_head.bbox_head
    head.shared_convs.append(nn.Conv2d(8, 8, 3, padding=1))
    place(model, name, in_channels=8, granularity='patch', grid_size=2)
    head.num_shared_convs = 1
    randomise(model).eval()
    with Tracer(model) as tracer:
        (result, *_) = tracer.predict(make_batch())
        places = tracer.detection_places(0, result.pred_instances)
        assert len(places) > 0
        assert (tracer.items(name, places) == -1).all()
        decisions = tracer.decisions(name, 3)
        rois = tracer.decisions(name, 3).image.bincount() // 4
        assert len(decisions.weights) == 4 * int(rois.sum())
        for image in range(3):
            code = decisions.code[decisions.image == image]
            assert code.tolist() == list(range(4 * int(rois[image])))
