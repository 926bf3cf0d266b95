"""Origins against every query and every token of the encoder decoded by hand."""

import copy

import pytest
import torch
from by_hand import check_same, inputs_of, state_of, traced_weights, weights_by_hand
from tiny_models import (
    BOXES,
    CLASSES,
    DETRS,
    build_detr,
    gt_instances,
    make_batch,
    predict,
)

from mmdet_moe.analysis.attribution import Tracer

ENCODER, DECODER = 'encoder.layers.0.ffn.layers', 'decoder.layers.1.ffn.layers'
LAYERS = (ENCODER, DECODER)
TWO_STAGES = ('two stages', 'dino')
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2)]  # of the levels of a batch of 64 × 96 px
QUERIES, TOKENS_OF = (
    9,
    {'detr': SIZES[2:3], 'deformable': SIZES, 'two stages': SIZES, 'dino': SIZES},
)


@pytest.fixture
def make(randomise):
    def build(kind, *paths):
        model = randomise(build_detr(kind, paths or LAYERS)).eval()
        if kind in TWO_STAGES:  # else the tokens on the padding, which are all the same, would win
            model.memory_trans_fc.bias.data.zero_()
            model.memory_trans_norm.bias.data.zero_()
        return model

    return build


@torch.no_grad()
def every_query(model, batch):
    """Boxes (N, Q, 4) in px of the original images, scores (N, Q, C), proposals (N, Q, 4)."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    samples = data['data_samples']
    seen = {}
    handle = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    inputs = model.forward_transformer(model.extract_feat(data['inputs']), samples)
    handle.remove()
    scores, boxes = (kind[-1] for kind in model.bbox_head(**inputs))
    softmax = not model.bbox_head.loss_cls.use_sigmoid
    scores = scores.softmax(-1)[..., :-1] if softmax else scores.sigmoid()
    found = []
    for sample, box in zip(samples, boxes, strict=True):
        height, width = sample.img_shape
        corners = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)
        scale = torch.tensor(list(sample.scale_factor) * 2)
        found.append(corners.clamp(0, 1) * torch.tensor([width, height] * 2) / scale)
    return torch.stack(found), scores, boxes, seen.get('reference_points')


@pytest.mark.parametrize('kind', DETRS)
def test_predictions_are_those_without_a_tracer(kind, make):
    model, batch = make(kind), make_batch()
    before, own = predict(model, batch), state_of(model)
    with Tracer(model) as tracer:
        for _ in range(2):
            check_same(tracer.predict(copy.deepcopy(batch)), before)
    assert state_of(model) == own
    check_same(predict(model, batch), before)


@pytest.mark.parametrize('kind', DETRS)
def test_detections_come_from_their_query(kind, make):
    model, batch = make(kind), make_batch()
    boxes, scores, relative, _ = every_query(model, batch)
    seen, alone = set(), 0
    with Tracer(model) as tracer:
        assert tracer.knows_origins
        assert tracer.num_levels == (4 if kind in TWO_STAGES else None)
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            found = result.pred_instances
            places = tracer.detection_places(i, found)
            assert places.image.tolist() == [i] * 6
            for d in range(6):
                difference = (boxes[i] - found.bboxes[d]).abs().amax(1)
                difference += (scores[i, :, found.labels[d]] - found.scores[d]).abs()
                query = int(places.source[d]) - i * QUERIES
                assert difference[query] < 1e-4
                alone += bool(difference.sort().values[1] > 1e-4)
                seen.add(query)
                if kind not in TWO_STAGES:
                    height, width = result.img_shape
                    assert places.level[d] == -1
                    centre = torch.stack([places.x[d] * 96 / width, places.y[d] * 64 / height])
                    torch.testing.assert_close(
                        centre.float(), relative[i, query, :2], rtol=0, atol=1e-5
                    )
    assert len(seen) > 4
    assert alone > 12


@pytest.mark.parametrize('kind', TWO_STAGES)
def test_queries_come_from_the_token_that_proposed_them(kind, make):
    """Of the boxes that all tokens propose, the one that the query starts from."""
    model, batch = make(kind), make_batch()
    *_, references = every_query(model, batch)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    memories = []
    handle = model.encoder.register_forward_hook(lambda *args: memories.append(args[2]))
    predict(model, batch)
    handle.remove()
    levels, alone = set(), 0
    with torch.no_grad(), Tracer(model) as tracer:
        results = tracer.predict(copy.deepcopy(batch))
        padding = torch.ones(3, 64, 96)
        for mask, sample in zip(padding, data['data_samples'], strict=True):
            mask[: sample.img_shape[0], : sample.img_shape[1]] = 0
        padding = torch.cat(
            [
                torch.nn.functional.interpolate(padding[None], size=size)[0].bool().flatten(1)
                for size in SIZES
            ],
            1,
        )
        output, start = model.gen_encoder_output_proposals(
            memories[0], padding, torch.tensor(SIZES)
        )
        proposed = (model.bbox_head.reg_branches[2](output) + start).sigmoid()
        for i, result in enumerate(results):
            places = tracer.detection_places(i, result.pred_instances)
            for d in range(len(places)):
                reference = references[i, places.source[d] - i * QUERIES]
                same = (proposed[i] - reference).abs().amax(1).lt(1e-6).nonzero().flatten()
                level = int(places.level[d])
                height, width = SIZES[level]
                row, column = int(places.y[d] * height), int(places.x[d] * width)
                token = sum(h * w for h, w in SIZES[:level]) + row * width + column
                assert token in same.tolist()
                assert places.x[d].item() == pytest.approx((column + 0.5) / width)
                assert places.y[d].item() == pytest.approx((row + 0.5) / height)
                alone += len(same) == 1
                levels.add(level)
    assert alone > 6  # tokens on the padding all propose the same
    assert len(levels) > 1


@pytest.mark.parametrize('kind', DETRS)
def test_weights_of_the_decoder_and_the_encoder(kind, make):
    model, batch = make(kind), make_batch()
    inputs = inputs_of(model, batch)
    sizes = SIZES[2:3] if kind == 'detr' else SIZES
    starts = [sum(h * w for h, w in sizes[:i]) for i in range(len(sizes))]
    with Tracer(model) as tracer, torch.no_grad():
        results = tracer.predict(copy.deepcopy(batch))
        for i, result in enumerate(results):
            places = tracer.detection_places(i, result.pred_instances)
            found, items, decisions = traced_weights(tracer, DECODER, places, 3)
            (queries,) = inputs[DECODER]
            expected = weights_by_hand(tracer.layers[DECODER].router, queries[i])
            torch.testing.assert_close(
                found, expected[places.source - i * QUERIES], rtol=0, atol=1e-5
            )
            assert (decisions.image[items] == i).all()
            assert decisions.code[items].tolist() == (places.source - i * QUERIES).tolist()
            assert torch.equal(decisions.level[items], places.level)

            found, items, decisions = traced_weights(tracer, ENCODER, places, 3)
            assert [len(items) for items in decisions.maps] == [h * w for h, w in sizes]
            if kind not in TWO_STAGES:
                assert (items == -1).all()
                continue
            (tokens,) = inputs[ENCODER]
            for d, level in enumerate(places.level.tolist()):
                height, width = sizes[level]
                row, column = int(places.y[d] * height), int(places.x[d] * width)
                token = tokens[i, starts[level] + row * width + column]
                expected = weights_by_hand(tracer.layers[ENCODER].router, token[None])
                torch.testing.assert_close(found[d], expected[0], rtol=0, atol=1e-5)
                assert decisions.level[items[d]] == level
                assert decisions.image[items[d]] == i
                centre = torch.stack([places.x[d], places.y[d]]).float()
                torch.testing.assert_close(decisions.centre[items[d]], centre)
        # The rows of all decisions are those of their tokens.
        decisions = tracer.decisions(ENCODER, 3)
        expected = weights_by_hand(tracer.layers[ENCODER].router, inputs[ENCODER][0].flatten(0, 1))
        torch.testing.assert_close(decisions.weights, expected, rtol=0, atol=1e-5)
        numbers = torch.arange(len(expected)).reshape(3, -1)
        assert torch.equal(decisions.image.reshape(3, -1), numbers // numbers.shape[1])
        assert torch.equal(decisions.code.reshape(3, -1), numbers % numbers.shape[1])


@pytest.mark.parametrize('kind', ['two stages', 'dino'])
def test_branches_that_are_called_several_times(kind, make):
    """The call that makes the boxes counts; proposals belong to their tokens."""
    first, *names = [f'bbox_head.reg_branches.{i}' for i in range(3)]
    model, batch = make(kind, first, *names), make_batch()
    inputs = inputs_of(model, batch)
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            queries = inputs[names[0]]
            assert [tuple(q.shape[:2]) for q in queries] == [(3, QUERIES)] * 2
            found, _, decisions = traced_weights(tracer, names[0], places, 3)
            expected = weights_by_hand(tracer.layers[names[0]].router, queries[-1][i])
            assert len(decisions.image) == 3 * QUERIES
            torch.testing.assert_close(
                found, expected[places.source - i * QUERIES], rtol=0, atol=1e-5
            )
            # It moves the points that the last layer starts from; the head's own call of it has no
            # part in the boxes. Deformable DETR cuts the gradient there: its part is unknown.
            found, items, _ = traced_weights(tracer, first, places, 3)
            if kind == 'dino':
                expected = weights_by_hand(tracer.layers[first].router, inputs[first][0][i])
                torch.testing.assert_close(
                    found, expected[places.source - i * QUERIES], rtol=0, atol=1e-5
                )
            else:
                assert (items == -1).all()
            _, items, decisions = traced_weights(tracer, names[1], places, 3)
            assert (items >= 0).all()
            assert torch.equal(decisions.level[items], places.level)


def test_shared_branch_counts_with_its_last_call(make):
    """Without refinement the six branches of Deformable DETR are one."""
    name = 'bbox_head.cls_branches.0'
    model, batch = make('deformable', name), make_batch()
    branches = model.bbox_head.cls_branches
    assert isinstance(branches[1], torch.nn.Linear)
    branches[1] = branches[0]
    inputs = inputs_of(model, batch)[name]
    assert len(inputs) == 2
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, *_ = traced_weights(tracer, name, places, 3)
            expected = weights_by_hand(tracer.layers[name].router, inputs[-1][i])
            torch.testing.assert_close(
                found, expected[places.source - i * QUERIES], rtol=0, atol=1e-5
            )


def test_head_of_detr(make):
    """Its branches are given (layers, images, queries, channels)."""
    name = 'bbox_head.reg_ffn.layers'
    model, batch = make('detr', name), make_batch()
    (inputs,) = inputs_of(model, batch)[name]
    assert inputs.shape[:3] == (1, 3, QUERIES)
    with Tracer(model) as tracer, torch.no_grad():
        for i, result in enumerate(tracer.predict(copy.deepcopy(batch))):
            places = tracer.detection_places(i, result.pred_instances)
            found, *_ = traced_weights(tracer, name, places, 3)
            expected = weights_by_hand(tracer.layers[name].router, inputs[0, i])
            torch.testing.assert_close(
                found, expected[places.source - i * QUERIES], rtol=0, atol=1e-5
            )


def test_as_many_tokens_as_queries_are_not_guessed(make):
    model = make('detr')
    model.num_queries = 6
    model.query_embedding = torch.nn.Embedding(6, 16)
    with Tracer(model) as tracer:
        (result, *_) = tracer.predict(make_batch())
        places = tracer.detection_places(0, result.pred_instances)
        assert (tracer.items(DECODER, places) == -1).all()
        assert (tracer.items(ENCODER, places) == -1).all()
        assert [len(items) for items in tracer.decisions(ENCODER, 3).maps] == [6]


@pytest.mark.parametrize('kind', DETRS)
def test_objects_are_those_of_the_queries_that_training_matches(kind, make):
    model, batch = make(kind), make_batch()
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    metas = [sample.metainfo for sample in data['data_samples']]
    truth = [gt_instances(i) for i in range(3)]
    with Tracer(model) as tracer, torch.no_grad():
        inputs = model.forward_transformer(model.extract_feat(data['inputs']), data['data_samples'])
        scores, boxes = (list(kind[-1]) for kind in model.bbox_head(**inputs))
        labels, *_ = model.bbox_head.get_targets(scores, boxes, truth, metas)
        results = tracer.predict(copy.deepcopy(batch))
        for i, result in enumerate(results):
            objects = torch.tensor(BOXES[i]).reshape(-1, 4)
            places, owner = tracer.object_places(
                i, result.metainfo, objects, torch.arange(len(objects))
            )
            queries = (labels[i] < CLASSES).nonzero().flatten()
            assert (places.source - i * QUERIES).tolist() == queries.tolist()
            assert owner.tolist() == labels[i][queries].tolist()
            assert sorted(owner.tolist()) == list(range(len(objects)))
            # The classes are part of the match: without them there is none.
            places, owner = tracer.object_places(i, result.metainfo, objects)
            assert places.source.tolist() == [-1] * len(objects)
            assert owner.tolist() == list(range(len(objects)))
