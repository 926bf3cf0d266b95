"""Origins against every prior decoded by hand, and against what changes what."""

import copy

import pytest
import torch
from by_hand import (
    candidates_of,
    cells_of,
    check_same,
    every_prior,
    inputs_of,
    patch_weights,
    traced_weights,
    weights_by_hand,
)
from tiny_models import (
    BOXES,
    CLASSES,
    MOE_BACKBONE,
    MOE_NECK,
    SCALES,
    build_single,
    gt_instances,
    make_batch,
    place,
    predict,
)
from traced_models import FROM_ALL_LEVELS

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.moe import add_experts, find_moe_layers

HEADS = ('fcos', 'atss', 'gfl', 'tood', 'yolox', 'rtmdet', 'rtmdet, objectness', 'ssd')
NAMES = ['moe retina', *(f'{head}, neck' for head in HEADS)]
OPTIONS = {
    'plain': {},
    'large boxes': {'min_bbox_size': 12},
    'scores': {'score_thr': 0.45},
    'few candidates': {'nms_pre': 5, 'max_per_img': 3},
    'all candidates': {'nms_pre': -1, 'max_per_img': 500},
    'no detections': {'score_thr': 1.1},
    'soft nms': {'nms': {'type': 'soft_nms', 'iou_threshold': 0.5, 'min_score': 0.3}},
}


@pytest.mark.sweep(keep=1 / 3)
@pytest.mark.parametrize('name', NAMES)
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


@pytest.mark.parametrize(
    ('name', 'option'),
    [
        *[('moe retina', option) for option in OPTIONS if option not in ('soft nms',)],
        *[(name, option) for name in NAMES[1:] for option in ('plain', 'few candidates')],
        ('fcos, neck', 'large boxes'),
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


# Layers of the head that are called once per level ------------------------------------------------

SHARED = {
    'fcos': ('cls_convs.0', 6),
    'atss': ('reg_convs.0', 6),
    'gfl': ('cls_convs.0', 6),
    'tood': ('inter_convs.1', 8),
}
OWN = {  # of the second level alone
    'yolox': ('multi_level_cls_convs.1.0', 6),
    'rtmdet': ('reg_convs.1.1', 6),
    'ssd': ('cls_convs.1.0', 6),
}


@pytest.mark.parametrize(
    ('head', 'granularity'),
    # How far Swish sees is not known, so that YOLOX has no patches.
    [(h, g) for h in [*SHARED, *OWN] for g in ('image', 'patch') if (h, g) != ('yolox', 'patch')],
)
def test_layers_inside_the_head(head, granularity, filled):
    """A shared layer has a decision for each level, in the order of its calls."""
    model = build_single(head, **FROM_ALL_LEVELS)
    path, channels = (SHARED | OWN)[head]
    name = f'bbox_head.{path}'
    options = {'granularity': granularity, 'grid_size': 2 if granularity == 'patch' else 1}
    place(model, name, in_channels=channels, **options)
    filled(model)
    batch = make_batch()
    maps = inputs_of(model, batch)[name]
    assert len(maps) == (3 if head in SHARED else 1)
    sizes, seen = [(8, 12), (4, 6), (2, 3)], set()
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, items, decisions = traced_weights(tracer, name, places, 3)
            for d, (level, row, column) in enumerate(cells_of(places, sizes)):
                seen.add(level)
                if head in OWN and level != 1:
                    assert items[d] == -1
                    continue
                index = level if head in SHARED else 0
                layer, x = tracer.layers[name], maps[index][i]
                expected = patch_weights(layer, x, options['grid_size'], row, column)
                torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)
                assert decisions.image[items[d]] == i
                assert decisions.level[items[d]] == index
            each = options['grid_size'] ** 2
            assert len(decisions.weights) == 3 * each * len(maps)
            assert sorted(decisions.code.tolist()) == sorted([*range(each * len(maps))] * 3)
    assert seen == {0, 1, 2}


def test_siblings_that_became_one_expert(filled):
    """A decision of ``cls_convs_moe`` for each level, as the mechanism puts it into the head."""
    model = build_single('fcos', **FROM_ALL_LEVELS)
    add_experts(model, {'bbox_head.cls_convs': {'num_experts': 3, 'top_k': 2}})
    (name,) = find_moe_layers(model)
    filled(model)
    batch = make_batch()
    maps = inputs_of(model, batch)[name]
    assert len(maps) == 3
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, _, decisions = traced_weights(tracer, name, places, 3)
            router = tracer.layers[name].router
            vectors = torch.stack([maps[level][i].mean((1, 2)) for level in places.level])
            torch.testing.assert_close(found, weights_by_hand(router, vectors), rtol=0, atol=1e-5)
            assert decisions.level.tolist() == [0] * 3 + [1] * 3 + [2] * 3
            assert torch.equal(decisions.routing.expert_ids, tracer.layers[name].routing.expert_ids)


def test_changed_call_changes_its_level_alone(filled):
    """Rerouting what a shared layer decides for one level changes that level and no other."""
    model = build_single('gfl', **FROM_ALL_LEVELS)
    name = 'bbox_head.cls_convs.0'
    place(model, name, in_channels=6)
    filled(model)
    batch = make_batch()
    before, _ = every_prior(model, batch)
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        places = [tracer.detection_places(i, r.pred_instances) for i, r in enumerate(results)]
        items = [tracer.items(name, p) for p in places]
    for decision in range(9):
        calls = []

        def change(_, __, routing, decision=decision, calls=calls):
            if decision // 3 == len(calls):
                routing.expert_ids[decision % 3] = (routing.expert_ids[decision % 3] + 1) % 3
            calls.append(routing)
            return routing

        handle = model.get_submodule(name).router.register_forward_hook(change)
        after, _ = every_prior(model, batch)
        handle.remove()
        for i, result in enumerate(results):
            for d, (prior, *_) in enumerate(candidates_of(result.pred_instances, before[i])):
                changed = (after[i][4][prior] - before[i][4][prior]).abs().max() > 1e-5
                assert changed == (items[i][d] == decision)


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
