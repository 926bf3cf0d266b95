"""Decisions before the head, and what holds for every head."""

import copy
import math

import pytest
import torch
from by_hand import (
    candidates_of,
    cells_of,
    check_same,
    every_prior,
    inputs_of,
    patch_weights,
    state_of,
    traced_weights,
    weights_by_hand,
)
from tiny_models import (
    MOE_BACKBONE,
    MOE_NECK,
    SIZES,
    STRIDES,
    build_single,
    make_batch,
    place,
    predict,
)
from traced_models import MODELS

from mmdet_moe.analysis.attribution import PLACE_FIELD, Tracer
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MoELayer, find_moe_layers


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


# Before the head ----------------------------------------------------------------------------------


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


# Tokens -------------------------------------------------------------------------------------------

SWIN = {
    'type': 'mmdet.SwinTransformer',
    'embed_dims': 4,
    'depths': (1, 1, 2, 1),
    'num_heads': (1, 1, 1, 1),
    'window_size': 2,
    'mlp_ratio': 1,
    'out_indices': (1, 2, 3),
    'drop_path_rate': 0.0,
}
SWIN_NECK = {'in_channels': [8, 16, 32]}


def swin(randomise, path, channels):
    model = build_single('retina', backbone=SWIN, neck=SWIN_NECK)
    name = f'backbone.stages.{path}'
    place(model, name, in_channels=channels, granularity='token')
    return randomise(model).eval(), name


@pytest.mark.parametrize(
    ('path', 'channels', 'stride'),
    [('2.blocks.1.ffn.layers', 16, 16), ('3.blocks.0.ffn.layers', 32, 32)],
)
def test_tokens_of_a_backbone_are_cells(path, channels, stride, randomise):
    """The tokens of a stage are the cells of the map it feeds, row by row."""
    model, name = swin(randomise, path, channels)
    batch = make_batch()
    (tokens,) = inputs_of(model, batch)[name]
    height, width = 64 // stride, 96 // stride
    known = 0
    with Tracer(model) as tracer, torch.no_grad():
        # What the sizes of the first batch were is not taken for those of the next.
        tracer.predict({key: values[:1] for key, values in make_batch().items()})
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, items, decisions = traced_weights(tracer, name, places, 3)
            for d in range(len(places)):
                row, column = int(places.y[d] * height), int(places.x[d] * width)
                token = tokens[i, row * width + column]
                expected = weights_by_hand(tracer.layers[name].router, token[None])[0]
                torch.testing.assert_close(found[d], expected, rtol=0, atol=1e-5)
                centre = torch.tensor([(column + 0.5) / width, (row + 0.5) / height])
                torch.testing.assert_close(decisions.centre[items[d]], centre)
                known += 1
    assert known > 10


def test_tokens_without_a_map_of_their_size_are_unknown(randomise):
    """The first stage's map is none of the backbone's: its tokens merge before the next one."""
    model, name = swin(randomise, '0.blocks.0.ffn.layers', 4)
    with Tracer(model) as tracer:
        (result, *_) = tracer.predict(make_batch())
        places = tracer.detection_places(0, result.pred_instances)
        assert len(places) > 0
        assert (tracer.items(name, places) == -1).all()
        decisions = tracer.decisions(name, 3)
        assert decisions.centre.isnan().all()
        assert decisions.image.bincount().tolist() == [16 * 24] * 3


def test_tokens_in_shifted_windows_are_unknown(randomise):
    """One window as large as the map has as many tokens as cells, but they are rolled."""
    model = build_single('retina', backbone={**SWIN, 'window_size': 6}, neck=SWIN_NECK)
    name = 'backbone.stages.2.blocks.1.attn.w_msa.qkv'
    place(model, name, in_channels=16, granularity='token')
    randomise(model).eval()
    sample = make_batch(1)
    sample['inputs'] = [torch.zeros(3, 96, 96, dtype=torch.uint8)]
    sample['data_samples'][0].set_metainfo({'img_shape': (96, 96)})
    with Tracer(model) as tracer:
        (result,) = tracer.predict(sample)
        places = tracer.detection_places(0, result.pred_instances)
        assert len(tracer.decisions(name, 1).image) == 36
        assert len(places) > 0
        assert (tracer.items(name, places) == -1).all()


def test_windows_cannot_be_told_to_images(randomise):
    model, name = swin(randomise, '2.blocks.1.attn.w_msa.qkv', 16)
    with Tracer(model) as tracer:
        tracer.predict(make_batch())
        with pytest.raises(ConfigError, match='decides on 18 inputs where the batch has 3 images'):
            tracer.decisions(name, 3)


# The rest -----------------------------------------------------------------------------------------


def test_unknown_heads_have_no_origins(make):
    model, batch = make('yolov3, neck'), make_batch()
    with Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        assert not tracer.knows_origins
        places = tracer.detection_places(0, results[0].pred_instances)
        assert len(places) == len(results[0].pred_instances) > 0
        assert set(places.level.tolist()) == {-1}
        assert places.x.isnan().all()
        for name in tracer.layers:
            assert (tracer.items(name, places) == -1).all()
            assert tracer.decisions(name, 3).image.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_patches_are_not_guessed_without_a_place(filled):
    """All levels of an unknown head hang on the stage, but where on it is not known."""
    model = filled(build_single('yolov3', MOE_BACKBONE, train_cfg=False))
    with Tracer(model) as tracer:
        (result, *_) = tracer.predict(make_batch())
        places = tracer.detection_places(0, result.pred_instances)
        assert len(places) > 0
        assert (tracer.items('backbone.layer4', places) == -1).all()


def test_models_without_experts_are_refused():
    with pytest.raises(ConfigError, match=r'SingleStageDetector\) has neither an MoE nor'):
        Tracer(build_single('retina'))


def test_weights_are_shares(randomise):
    """With ``over_all`` the weights of a decision sum to less than 1, their shares do not."""
    model = build_single('moe retina')
    for branch in ('cls', 'reg'):
        getattr(model.bbox_head, f'{branch}_moe').router.softmax = 'over_all'
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
