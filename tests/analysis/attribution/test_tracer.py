"""Origins against every prior and every RoI decoded by hand, and against what changes what."""

import copy
import math

import pytest
import torch
from mmengine.structures import InstanceData
from tiny_models import (
    BOXES,
    CLASSES,
    FOUR,
    MOE_BACKBONE,
    MOE_NECK,
    SCALES,
    SIZES,
    STRIDES,
    build_faster,
    build_single,
    gt_instances,
    make_batch,
    predict,
)
from torch import nn

from mmdet_moe.analysis.attribution import PLACE_FIELD
from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MoELayer, find_moe_layers

MODELS = {
    'moe retina': lambda: build_single('moe retina'),
    'retina, neck': lambda: build_single('retina', neck=MOE_NECK),
    'retina, backbone': lambda: build_single('retina', MOE_BACKBONE),
    'moe retina, neck, backbone': lambda: build_single('moe retina', MOE_BACKBONE, MOE_NECK),
    'fcos, neck': lambda: build_single('fcos', neck=MOE_NECK),
    'atss, neck': lambda: build_single('atss', neck=MOE_NECK),
    'gfl, neck': lambda: build_single('gfl', neck=MOE_NECK),
    'faster': lambda: build_faster(FOUR),
    'faster, dense head': lambda: build_faster(neck=MOE_NECK),
    'faster, agnostic': lambda: build_faster(FOUR, reg_class_agnostic=True),
}
OPTIONS = {
    'plain': {},
    'large boxes': {'min_bbox_size': 12},
    'scores': {'score_thr': 0.45},
    'few candidates': {'nms_pre': 5, 'max_per_img': 3},
    'all candidates': {'nms_pre': -1, 'max_per_img': 500},
    'no detections': {'score_thr': 1.1},
    'soft nms': {'nms': {'type': 'soft_nms', 'iou_threshold': 0.5, 'min_score': 0.3}},
}


@pytest.fixture
def make(randomise):
    """A model with random weights everywhere; its scores are neither all 0 nor all 1."""

    def build(name, **test_cfg):
        model = MODELS[name]()
        randomise(model)
        if hasattr(model, 'bbox_head'):
            model.bbox_head.test_cfg.update(copy.deepcopy(test_cfg))
            for layer in model.bbox_head.modules():
                # Boxes that differ, but not by factors.
                if isinstance(layer, nn.Conv2d) and layer.out_channels % 4 == 0:
                    layer.weight.data *= 0.3
        return model.eval()

    return build


def state_of(model):
    """What an instance has of its own, besides parameters, and its hooks."""
    found = {}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[name] = (set(vars(module)), hooks)
        for attribute in ('bbox_coder', 'assigner', 'prior_generator'):
            if attribute in vars(module):
                found[f'{name}.{attribute}'] = set(vars(vars(module)[attribute]))
    return found


def check_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a, b = a.pred_instances, b.pred_instances
        assert len(a) == len(b)
        for field in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(a[field], b[field], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_predictions_are_those_without_a_tracer(name, make):
    model, batch = make(name), make_batch()
    before, state = predict(model, batch), copy.deepcopy(model.state_dict())
    own = state_of(model)
    with Tracer(model) as tracer:
        for _ in range(2):
            found = tracer.predict(copy.deepcopy(batch))
            check_same(found, before)
            assert sum(len(result.pred_instances) for result in found) > 10
    assert state_of(model) == own
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    after = predict(model, batch)
    check_same(after, before)
    assert not any(PLACE_FIELD in result.pred_instances for result in after)


@pytest.mark.parametrize('name', ['moe retina', 'fcos, neck', 'atss, neck'])
@pytest.mark.parametrize('option', OPTIONS)
def test_predictions_with_other_thresholds(name, option, make):
    model, batch = make(name, **OPTIONS[option]), make_batch()
    expected = predict(model, batch)
    with Tracer(model) as tracer:
        found = tracer.predict(copy.deepcopy(batch))
        check_same(found, expected)
        for i, result in enumerate(found):
            assert len(tracer.detection_places(i, result.pred_instances)) == len(
                result.pred_instances
            )
    if option == 'no detections':
        assert not any(len(result.pred_instances) for result in found)


@pytest.mark.parametrize('name', ['moe retina', 'faster'])
def test_model_is_as_before_after_an_error(name, make):
    model = make(name)
    own = state_of(model)

    def break_down(*_):
        raise KeyboardInterrupt

    handle = next(iter(find_moe_layers(model).values())).register_forward_hook(break_down)
    with pytest.raises(KeyboardInterrupt), Tracer(model) as tracer:
        tracer.predict(make_batch())
    handle.remove()
    assert state_of(model) == own


# Dense heads -------------------------------------------------------------------------------------


@torch.no_grad()
def every_prior(model, batch):
    """For each image: level, cell, box, scores of every prior, decoded one level after another."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    head = model.bbox_head
    scores, deltas, *factors = head(model.extract_feat(data['inputs']))
    sizes = [tuple(level.shape[-2:]) for level in scores]
    priors = head.prior_generator.grid_priors(sizes, dtype=torch.float32, device='cpu')
    found = []
    for i, sample in enumerate(data['data_samples']):
        rows = []
        for level in range(len(sizes)):
            score = scores[level][i].permute(1, 2, 0).reshape(-1, CLASSES).sigmoid()
            if factors:
                score = score * factors[0][level][i].permute(1, 2, 0).reshape(-1, 1).sigmoid()
            delta = deltas[level][i].permute(1, 2, 0).reshape(-1, 4)
            box = head.bbox_coder.decode(priors[level], delta, max_shape=sample.img_shape)
            box = box / torch.tensor(list(sample.scale_factor) * 2)
            height, width = sizes[level]
            per_cell = len(delta) // (height * width)
            cell = torch.arange(len(delta)) // per_cell
            levels = torch.full_like(cell, level)
            rows.append((levels, cell // width, cell % width, box, score))
        found.append([torch.cat(part) for part in zip(*rows, strict=True)])
    return found, sizes


def candidates_of(detections, image_priors):
    """For each detection the priors with its box and its score."""
    level, row, column, box, score = image_priors
    for i in range(len(detections)):
        label = detections.labels[i]
        same = (score[:, label] - detections.scores[i]).abs() < 1e-6
        same &= ((box - detections.bboxes[i]).abs() < 1e-3).all(1)
        yield same.nonzero().flatten(), level[same], row[same], column[same]


@pytest.mark.parametrize(
    ('name', 'option'),
    [
        *[('moe retina', option) for option in OPTIONS if option not in ('soft nms',)],
        ('fcos, neck', 'plain'),
        ('fcos, neck', 'large boxes'),
        ('atss, neck', 'plain'),
    ],
)
def test_detections_come_from_their_prior(name, option, make):
    model, batch = make(name, **OPTIONS[option]), make_batch()
    priors, sizes = every_prior(model, batch)
    levels, unambiguous, total = set(), 0, 0
    with Tracer(model) as tracer:
        assert (tracer.num_levels, tracer.knows_origins) == (3, True)
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            detections = result.pred_instances
            assert places.image.tolist() == [i] * len(detections)
            assert places.source.tolist() == [-1] * len(detections)
            for d, (_, level, row, column) in enumerate(candidates_of(detections, priors[i])):
                height, width = sizes[places.level[d]]
                claimed = places.level[d], places.y[d] * height - 0.5, places.x[d] * width - 0.5
                same = [
                    torch.stack(cell).double().allclose(torch.stack(claimed).double())
                    for cell in zip(level.double(), row, column, strict=True)
                ]
                assert sum(same) >= 1
                levels.add(level[0].item())
                unambiguous += len(set(zip(row.tolist(), column.tolist(), strict=True))) == 1
                total += 1
    assert unambiguous > 0.7 * total or total == 0
    if option == 'plain':
        assert len(levels) > 1
    assert bool(levels) == (option != 'no detections')


def weights_by_hand(router, vectors):
    """(T, E) of vectors (T, C)."""
    logits = vectors @ router.fc.weight.T + router.fc.bias
    kept = logits >= logits.topk(router.top_k).values[:, -1:]
    return logits.masked_fill(~kept, -math.inf).softmax(1)


@torch.no_grad()
def inputs_of(model, batch):
    """What each MoE layer is given, by its name."""
    seen, handles = {}, []
    for name, layer in find_moe_layers(model).items():

        def keep(_, args, name=name):
            seen[name] = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])

        handles.append(layer.register_forward_pre_hook(keep))
    predict(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def traced_weights(tracer, name, places, num_images):
    decisions = tracer.decisions(name, num_images)
    items = tracer.items(name, places)
    weights = torch.full((len(places), decisions.weights.shape[1]), math.nan)
    weights[items >= 0] = decisions.weights[items[items >= 0]]
    return weights, items, decisions


def test_weights_of_head_decisions(make):
    """One decision per image and level, on the mean of the level's map."""
    model, batch = make('moe retina'), make_batch()
    maps = inputs_of(model, batch)
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            for name in ('bbox_head.cls_moe', 'bbox_head.reg_moe'):
                router = model.get_submodule(name).router
                found, _, decisions = traced_weights(tracer, name, places, 3)
                assert decisions.centre.isnan().all()
                for weights, level in zip(found, places.level, strict=True):
                    vector = maps[name][level][i : i + 1].mean((2, 3))
                    torch.testing.assert_close(
                        weights, weights_by_hand(router, vector)[0], rtol=0, atol=1e-5
                    )
                assert decisions.image.tolist() == [0, 1, 2] * 3
                assert decisions.level.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_changed_decision_changes_its_detections_alone(make):
    """Sending one image and level elsewhere changes the scores of its priors and of no other."""
    model, batch = make('moe retina'), make_batch()
    before, _ = every_prior(model, batch)
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        places = [tracer.detection_places(i, r.pred_instances) for i, r in enumerate(results)]
        items = [tracer.items('bbox_head.cls_moe', p) for p in places]
    assert len({item for part in items for item in part.tolist()}) > 4
    for decision in range(9):

        def change(_, __, routing, decision=decision):
            routing.expert_ids[decision] = (routing.expert_ids[decision] + 1) % 4
            return routing

        handle = model.bbox_head.cls_moe.router.register_forward_hook(change)
        after, _ = every_prior(model, batch)
        handle.remove()
        for i, result in enumerate(results):
            found = candidates_of(result.pred_instances, before[i])
            for d, (prior, *_) in enumerate(found):
                # Other sub-batches of an expert are rounded in another way.
                changed = (after[i][4][prior] - before[i][4][prior]).abs().max() > 1e-4
                assert changed == (items[i][d] == decision)


# Before the head ----------------------------------------------------------------------------------


def patch_bounds(length, grid):
    grid = min(grid, length)
    return [i * length // grid for i in range(grid + 1)]


def patch_weights(layer, x, grid, row, column, stride=1):
    """Of the patch of one image's map that holds an output pixel."""
    height, width = (-(-size // stride) for size in x.shape[-2:])
    for top, bottom in zip(*[patch_bounds(height, grid)[k:] for k in (0, 1)], strict=False):
        for left, right in zip(*[patch_bounds(width, grid)[k:] for k in (0, 1)], strict=False):
            if top <= row < bottom and left <= column < right:
                patch = x[:, top * stride : bottom * stride, left * stride : right * stride]
                return weights_by_hand(layer.router, patch.mean((1, 2))[None])[0]
    raise AssertionError


def cells_of(places, sizes):
    """Level, row, column of places."""
    for level, x, y in zip(places.level.tolist(), places.x, places.y, strict=True):
        height, width = sizes[level]
        yield level, math.floor(y * height), math.floor(x * width)


@pytest.mark.parametrize('extra', [0, 2])
def test_patches_of_the_neck(extra, randomise):
    """Each level has a layer of its own; levels beyond come from the last one."""
    neck = {**MOE_NECK, 'num_outs': 3 + extra, 'add_extra_convs': 'on_output' if extra else False}
    model = build_single('retina', neck=neck)
    if extra:
        from mmdet.registry import TASK_UTILS
        from tiny_models import ANCHORS

        generator = TASK_UTILS.build({**ANCHORS, 'strides': [8, 16, 32, 64, 128]})
        model.bbox_head.prior_generator = generator
        nms = {'type': 'nms', 'iou_threshold': 0.95}
        model.bbox_head.test_cfg.update(nms_pre=8, max_per_img=200, nms=nms)
    randomise(model).eval()
    batch = make_batch()
    maps = inputs_of(model, batch)
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    seen = set()
    with Tracer(model) as tracer, torch.no_grad():
        assert tracer.num_levels == 3 + extra
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            for index in range(3):
                name = f'neck.fpn_convs.{index}'
                layer, (x,) = model.get_submodule(name), maps[name]
                found, items, _ = traced_weights(tracer, name, places, 3)
                for d, (level, row, column) in enumerate(cells_of(places, sizes)):
                    seen.add(level)
                    if min(level, 2) != index:
                        assert items[d] == -1
                        continue
                    # The place on the layer's own map.
                    row = math.floor((row + 0.5) * x.shape[2] / sizes[level][0])
                    column = math.floor((column + 0.5) * x.shape[3] / sizes[level][1])
                    expected = patch_weights(layer, x[i], 2, row, column)
                    torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)
    assert len(seen) == 3 + extra


def test_layer_takes_no_part_where_nothing_hangs_on_it(make):
    """Rerouting a level of the neck moves all and only the detections that are traced to it."""
    model, batch = make('retina, neck', nms_pre=20), make_batch()
    before, _ = every_prior(model, batch)
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        places = [tracer.detection_places(i, r.pred_instances) for i, r in enumerate(results)]
        items = {n: [tracer.items(n, p) for p in places] for n in tracer.layers}
    for name in items:

        def change(_, __, routing):
            routing.expert_ids[:] = (routing.expert_ids + 1) % 3
            return routing

        handle = model.get_submodule(name).router.register_forward_hook(change)
        after, _ = every_prior(model, batch)
        handle.remove()
        moved = []
        for i, result in enumerate(results):
            for d, (prior, *_) in enumerate(candidates_of(result.pred_instances, before[i])):
                difference = (after[i][4][prior] - before[i][4][prior]).abs().max()
                if items[name][i][d] >= 0:
                    moved.append((difference > 1e-4).item())
                else:
                    assert difference == 0
        # Behind a ReLU a difference can vanish.
        assert len(moved) > 3
        assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize(('grid', 'stage'), [(3, 4), (2, 3)])
def test_patches_of_the_backbone(grid, stage, randomise):
    """Every level of the pyramid hangs on the last stage, by the top-down path."""
    model = build_single('retina', {**MOE_BACKBONE, 'grid_size': grid, 'moe_stages': [stage]})
    randomise(model).eval()
    batch, name = make_batch(), f'backbone.layer{stage}'
    (x,) = inputs_of(model, batch)[name]
    sizes = [(8, 12), (4, 6), (2, 3)]
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, items, decisions = traced_weights(tracer, name, places, 3)
            layer = tracer.layers[name]
            height, width = sizes[stage - 2]
            assert len(decisions.image) == 3 * min(grid, height) * min(grid, width)
            assert (items >= 0).all()
            for d, (level, row, column) in enumerate(cells_of(places, sizes)):
                row = math.floor((row + 0.5) * STRIDES[level] / STRIDES[stage - 2])
                column = math.floor((column + 0.5) * STRIDES[level] / STRIDES[stage - 2])
                expected = patch_weights(layer, x[i], grid, row, column, layer.stride)
                torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)


def test_pixels(randomise):
    model = build_single('retina')
    layer = MoELayer(LinearExperts(6, 6, 3), 3, 2, in_channels=6, granularity='pixel')
    model.neck.fpn_convs[1] = layer
    randomise(model).eval()
    batch = make_batch()
    (x,) = inputs_of(model, batch)['neck.fpn_convs.1']
    with Tracer(model) as tracer, torch.no_grad():
        results = tracer.predict(copy.deepcopy(batch))
        for i, result in enumerate(results):
            places = tracer.detection_places(i, result.pred_instances)
            found, items, decisions = traced_weights(tracer, 'neck.fpn_convs.1', places, 3)
            assert len(decisions.image) == 3 * 24
            for d, (level, row, column) in enumerate(cells_of(places, [(8, 12), (4, 6), (2, 3)])):
                if level != 1:
                    assert items[d] == -1
                    continue
                expected = weights_by_hand(layer.router, x[i, :, row, column][None])[0]
                torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)
                centre = torch.tensor([(column + 0.5) / 6, (row + 0.5) / 4])
                torch.testing.assert_close(decisions.centre[items[d]], centre)
                assert decisions.image[items[d]] == i


# Objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('allowed_border', [-1, 0])
def test_objects_of_an_anchor_head_are_those_of_training(allowed_border, make):
    model, batch = make('moe retina'), make_batch()
    head = model.bbox_head
    head.train_cfg['allowed_border'] = allowed_border
    sizes = [(8, 12), (4, 6), (2, 3)]
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        metas = [result.metainfo for result in results]
        anchors, valid = head.get_anchors(sizes, metas, device='cpu')
        truth = [gt_instances(i) for i in range(3)]
        labels, *_ = head.get_targets(anchors, valid, truth, metas)
        total = 0
        for i in range(3):
            expected = []
            for level, values in enumerate(labels):
                for index in ((values[i] >= 0) & (values[i] < CLASSES)).nonzero().flatten():
                    cell = index.item() // 4
                    row, column = divmod(cell, sizes[level][1])
                    expected.append((level, row, column, values[i][index].item()))
            places, owner = tracer.object_places(i, metas[i], torch.tensor(BOXES[i]).reshape(-1, 4))
            found = [
                (*cell, o) for cell, o in zip(cells_of(places, sizes), owner.tolist(), strict=True)
            ]
            assert sorted(found) == sorted(expected)
            assert places.image.tolist() == [i] * len(found)
            total += len(found)
            if allowed_border < 0:
                assert set(owner.tolist()) == set(range(len(BOXES[i])))
    assert total > 5


@pytest.mark.parametrize('kind', ['fcos', 'no training'])
def test_objects_of_other_heads_stand_where_they_are(kind, randomise):
    """No level is made up; a layer that all levels hang on has a part in them."""
    if kind == 'fcos':
        model = build_single('fcos', MOE_BACKBONE, MOE_NECK)
    else:
        model = build_single('retina', MOE_BACKBONE, MOE_NECK, train_cfg=False)
    randomise(model).eval()
    batch = make_batch()
    (x,) = inputs_of(model, batch)['backbone.layer4']
    with Tracer(model) as tracer, torch.no_grad():
        results = tracer.predict(copy.deepcopy(batch))
        for i, result in enumerate(results):
            boxes = torch.tensor(BOXES[i]).reshape(-1, 4)
            places, owner = tracer.object_places(i, result.metainfo, boxes)
            assert owner.tolist() == list(range(len(boxes)))
            assert places.level.tolist() == [-1] * len(boxes)
            found, items, _ = traced_weights(tracer, 'backbone.layer4', places, 3)
            for d, box in enumerate(boxes):
                middle_x = (box[0] + box[2]) / 2 * SCALES[i][0]
                middle_y = (box[1] + box[3]) / 2 * SCALES[i][1]
                layer = tracer.layers['backbone.layer4']
                # The map's pixels are 32 px wide.
                expected = patch_weights(
                    layer, x[i], 3, int(middle_y // 32), int(middle_x // 32), layer.stride
                )
                torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)
            assert (tracer.items('neck.fpn_convs.0', places) == -1).all()
            assert (items >= 0).all()


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


def iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


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
            network = gt_instances(i).bboxes.tolist()
            expected = []
            for t, roi in enumerate(proposals[i]):
                overlaps = [iou(roi, box) for box in network]
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


# The rest -----------------------------------------------------------------------------------------


def test_unknown_heads_have_no_origins(make):
    model, batch = make('gfl, neck'), make_batch()
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        assert not tracer.knows_origins
        places = tracer.detection_places(0, results[0].pred_instances)
        assert len(places) == len(results[0].pred_instances) > 0
        assert set(places.level.tolist()) == {-1}
        for name in tracer.layers:
            assert (tracer.items(name, places) == -1).all()
            assert tracer.decisions(name, 3).image.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_models_without_experts_are_refused():
    with pytest.raises(ConfigError, match=r'SingleStageDetector\) has no MoE layer'):
        Tracer(build_single('retina'))


def test_weights_are_shares(randomise):
    """With ``softmax='all'`` the weights of a decision sum to less than 1, their shares do not."""
    model = build_single('moe retina')
    for branch in ('cls', 'reg'):
        getattr(model.bbox_head, f'{branch}_moe').router.softmax = 'all'
    randomise(model).eval()
    with Tracer(model) as tracer:
        tracer.predict(make_batch())
        decisions = tracer.decisions('bbox_head.cls_moe', 3)
    assert (decisions.routing.weights.sum(1) < 0.999).all()
    torch.testing.assert_close(decisions.weights.sum(1), torch.ones(9))
    assert ((decisions.weights > 0).sum(1) == 2).all()


def test_sizes():
    """The batch is what the tests above say."""
    assert [(h, w) for h, w in SIZES] == [(64, 80), (40, 96), (60, 64)]
