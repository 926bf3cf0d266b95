"""MoERetinaHead against MMDetection's RetinaHead with the same weights, alone and in a detector."""

import copy
import math

import pytest
import torch
from copies import check_detections, check_gradients, check_same
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint, load_state_dict
from tiny_models import ASSIGNER, FOUR, RESNET_18, RETINA, TEST_CFG, two_images
from torch._dynamo.utils import counters
from torchvision.ops import box_iou

from mmdet_moe.engine.hooks.balancing_loss_hook import _AddLosses
from mmdet_moe.errors import ConfigError
from mmdet_moe.models.positives import _asks_for_targets
from mmdet_moe.moe import ImportanceLoss

HEAD = {**RETINA, 'stacked_convs': 2}
TRAIN_CFG = {
    'assigner': ASSIGNER,
    'sampler': {'type': 'mmdet.PseudoSampler'},
    'allowed_border': -1,
    'pos_weight': -1,
    'debug': False,
}
DETECTOR = {
    'type': 'mmdet.RetinaNet',
    'data_preprocessor': {'type': 'mmdet.DetDataPreprocessor'},
    'backbone': {**RESNET_18, 'out_indices': (1, 2, 3)},
    'neck': {'type': 'mmdet.FPN', 'in_channels': [4, 8, 16], 'out_channels': 6, 'num_outs': 3},
    'bbox_head': HEAD,
    'train_cfg': TRAIN_CFG,
    'test_cfg': TEST_CFG,
}


def build_head(moe=None, **options):
    name = 'mmdet.RetinaHead' if moe is None else 'mmdet_moe.MoERetinaHead'
    config = {**HEAD, 'train_cfg': TRAIN_CFG, 'test_cfg': TEST_CFG, **options, 'type': name}
    return MODELS.build({**copy.deepcopy(config), **(moe or {})})


def build_detector(moe=None):
    config = copy.deepcopy(DETECTOR)
    if moe is not None:
        config['bbox_head'].update(moe, type='mmdet_moe.MoERetinaHead')
    return MODELS.build(config)


def features(num_images=2, dtype=torch.float32):
    return [torch.randn(num_images, 6, s, s + 3, dtype=dtype) for s in (9, 5, 3)]


@pytest.mark.parametrize('branches', [('cls',), ('reg',), ('cls', 'reg')], ids='-'.join)
@pytest.mark.parametrize(
    'moe',
    [
        {'num_experts': 1, 'top_k': 1},
        FOUR,
        {'num_experts': 4, 'top_k': 4},
        {'num_experts': 4, 'top_k': 3, 'router': {'type': 'mmdet_moe.ConvGAPRouter'}},
    ],
    ids=str,
)
def test_same_as_dense(moe, branches, randomise, tmp_path):
    norm = {'norm_cfg': {'type': 'BN'}}
    dense, model = build_head(**norm), build_head({**moe, 'moe_branches': branches}, **norm)
    randomise(dense).eval(), randomise(model).eval()
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'))
    maps = features()
    for level in maps:
        single = model.forward_single(level), dense.forward_single(level)
        torch.testing.assert_close(*single, rtol=1e-5, atol=1e-5)
    check_same(dense, model, maps)


@pytest.mark.parametrize('branch', ['cls', 'reg'])
def test_different_experts(branch, randomise):
    """Each image and level: its own mixture of the experts' outputs, by the branch's own router."""
    model = randomise(build_head(FOUR)).double().eval()
    maps = features(3, torch.float64)
    outputs = model(maps)[branch == 'reg']
    layer = model.get_submodule(f'{branch}_moe')
    assert model.cls_moe.router is not model.reg_moe.router
    assert layer.routing.items_per_level == (3, 3, 3)
    fc = layer.router.fc
    for level, output in zip(maps, outputs, strict=True):
        logits = level.mean((2, 3)) @ fc.weight.T + fc.bias
        kept = logits >= logits.topk(2).values[:, 1:]
        weights = logits.masked_fill(~kept, -math.inf).softmax(1)[:, :, None, None, None]
        stacked = []
        for expert in layer.experts:
            x = level
            for conv in getattr(expert, f'{branch}_convs'):
                x = conv.conv(x).clamp(min=0)
            stacked.append(getattr(expert, f'retina_{branch}')(x))
        expected = (weights * torch.stack(stacked, 1)).sum(1)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('moe', [{'num_experts': 1, 'top_k': 1}, FOUR], ids=str)
def test_detector_with_copies_has_the_dense_losses(moe, randomise):
    dense, model = randomise(build_detector()), randomise(build_detector(moe))
    load_state_dict(model, dense.state_dict())
    dense, model = dense.double().train(), model.double().train()
    images, samples = two_images()
    losses = [m(images.double(), copy.deepcopy(samples), mode='loss') for m in (dense, model)]
    assert set(losses[0]) == {'loss_cls', 'loss_bbox'}
    assert sum(losses[0]['loss_bbox']) > 0.1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        sum(sum(levels) for levels in loss.values()).backward()
    check_gradients(dense, model)


def test_detector_with_copies_has_the_dense_detections(randomise):
    dense, model = randomise(build_detector()), randomise(build_detector(FOUR))
    load_state_dict(model, dense.state_dict())
    check_detections(dense, model, *two_images())


def test_decisions_count_the_positive_anchors_of_their_level():
    """Positive: at least half overlap with an object, or the best anchor of an object."""
    model = build_head(FOUR)
    _, samples = two_images()
    model.loss([torch.randn(2, 6, 64 // s, 96 // s) for s in (8, 16, 32)], samples)
    anchors = model.prior_generator.grid_priors([(8, 12), (4, 6), (2, 3)], device='cpu')
    expected = []
    for level in range(3):
        for sample in samples:
            positives = set()
            for box in sample.gt_instances.bboxes.double():
                by_level = [box_iou(a.double(), box[None])[:, 0].tolist() for a in anchors]
                best = max(max(values) for values in by_level)
                positives |= {
                    i
                    for i, value in enumerate(by_level[level])
                    if value >= 0.5 or value == pytest.approx(best, abs=1e-6)
                }
            expected.append(len(positives))
    assert len(set(expected)) > 2
    for layer in (model.cls_moe, model.reg_moe):
        assert layer.routing.decision_weights.tolist() == expected


@pytest.mark.parametrize('name', ['FreeAnchorRetinaHead', 'DDODHead'])
def test_heads_whose_loss_asks_for_no_targets(name):
    kind = MODELS.get(f'mmdet.{name}')
    assert not _asks_for_targets(kind)
    with pytest.raises(ConfigError, match=f"the loss of {name} does not call; use .*'uniform'"):
        MODELS.build(
            {
                'type': 'mmdet_moe.WithExperts',
                'of': f'mmdet.{name}',
                'num_classes': 3,
                'in_channels': 6,
                'feat_channels': 32,  # of which its normalisation makes 32 groups
                'stacked_convs': 1,
                'experts': [dict(at='cls_convs', num_experts=2, decision_weight='positives')],
            }
        )


@pytest.mark.parametrize(
    'name', ['RetinaHead', 'RPNHead', 'GFLHead', 'ATSSHead', 'TOODHead', 'SSDHead', 'RTMDetHead']
)
def test_heads_whose_loss_asks_for_targets(name):
    assert _asks_for_targets(MODELS.get(f'mmdet.{name}'))


def test_semi_supervised_detectors():
    """They call ``student.loss(...)`` for labelled images, and again for others."""
    constraint = {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 1.0}
    router = {'type': 'mmdet_moe.GAPRouter', 'init_std': 1.0, 'constraint': constraint}
    experts = {'backbone.layer4': {}, 'bbox_head.{cls_convs,retina_cls}': {}}
    for options in experts.values():
        options.update(num_experts=4, top_k=2, decision_weight='uniform')
    experts['bbox_head.{cls_convs,retina_cls}']['decision_weight'] = 'positives'
    detector = copy.deepcopy(DETECTOR)
    detector.update(type='mmdet_moe.WithExperts', of='mmdet.RetinaNet')
    detector.update(experts=experts, router=router)
    semi = MODELS.build(
        {
            'type': 'mmdet.SemiBaseDetector',
            'detector': detector,
            'semi_train_cfg': {'freeze_teacher': True, 'sup_weight': 1.0},
        }
    ).train()
    images, samples = two_images()
    layer = semi.student.bbox_head.cls_convs_moe
    by_pass = []
    for part in (slice(0, 1), slice(0, 2)):
        semi.loss_by_gt_instances(images[part], copy.deepcopy(samples[part]))
        assert layer.routing.items_per_level == (len(images[part]),) * 3
        by_pass.append((layer.routing.decision_weights, layer.routing.dense_weights()))
    constraint = layer.router.constraint
    assert constraint.num_batches == 2
    shares = [(counts @ weights) / counts.sum() for counts, weights in by_pass]
    torch.testing.assert_close(constraint.mean_importance, sum(shares).detach() / 2)

    # With the hook what both of them decide is one pass.
    add = _AddLosses([ImportanceLoss(1.0)], ['student.bbox_head.cls_convs_moe'])
    add.begin(semi, (images, samples, 'loss'), {})
    for part in (slice(0, 1), slice(0, 2)):
        semi.loss_by_gt_instances(images[part], copy.deepcopy(samples[part]))
    losses = add(semi, (images, samples, 'loss'), {}, {})
    assert constraint.num_batches == 3
    assert layer.routing.items_per_level == (1, 1, 1, 2, 2, 2)
    counts = torch.cat([counts for counts, _ in by_pass])
    assert torch.equal(layer.routing.decision_weights, counts)
    importance = counts @ layer.routing.dense_weights()
    expected = importance.var() / importance.mean() ** 2
    torch.testing.assert_close(losses['loss_moe_student_bbox_head_cls_convs_moe'], expected)


@pytest.mark.parametrize(('granularity', 'grid_size'), [('pixel', 1), ('patch', 2)])
def test_positive_anchors_of_pixels_and_patches(granularity, grid_size):
    """Those of the image's decision on the level, divided among its items by their places."""
    options = {**FOUR, 'granularity': granularity, 'grid_size': grid_size, 'whole_maps': True}
    model, image = build_head(options), build_head(FOUR)
    maps = [torch.randn(2, 6, 64 // s, 96 // s) for s in (8, 16, 32)]
    _, samples = two_images()
    inside = {}
    get_targets = image.get_targets

    def remember(*args, **kwargs):
        targets = get_targets(*args, **kwargs)
        inside['labels'] = targets[0]
        return targets

    image.get_targets = remember
    for head in (model, image):
        head.loss(maps, samples)
    weights = model.cls_moe.routing.decision_weights
    by_level = weights.split(list(model.cls_moe.routing.items_per_level))
    per_image = [level.view(2, -1).sum(1) for level in by_level]
    assert torch.cat(per_image).tolist() == image.cls_moe.routing.decision_weights.tolist()
    for level, labels in enumerate(inside['labels']):
        height, width = maps[level].shape[2:]
        expected = torch.zeros(2, len(model.cls_moe.items[level]))
        for n, anchor in (labels < 3).nonzero().tolist():
            cell = anchor // (labels.shape[1] // (height * width))
            row, column = divmod(cell, width)
            place = [torch.tensor([(i + 0.5) / of]) for i, of in ((column, width), (row, height))]
            expected[n, model.cls_moe.items[level].locate(*place)] += 1
        assert by_level[level].tolist() == expected.flatten().tolist()


@pytest.mark.parametrize('decision_weight', ['uniform', 'area'])
def test_other_decision_weights(decision_weight):
    model = build_head({**FOUR, 'decision_weight': decision_weight})
    model.loss([torch.randn(2, 6, 64 // s, 96 // s) for s in (8, 16, 32)], two_images()[1])
    areas = [96, 96, 24, 24, 6, 6] if decision_weight == 'area' else [1] * 6
    assert model.cls_moe.routing.decision_weights.tolist() == areas


@pytest.mark.parametrize('branches', [('cls',), ('reg',), ('cls', 'reg')], ids='-'.join)
@pytest.mark.parametrize('expert_init', ['shared', 'independent'])
def test_initialisation_of_the_dense_head(branches, expert_init):
    """Every classifier starts at a probability of 0.01, every convolution at std 0.01."""
    config = {
        'type': 'Normal',
        'layer': 'Conv2d',
        'std': 0.01,
        'override': {'type': 'Normal', 'name': 'retina_cls', 'std': 0.01, 'bias_prob': 0.01},
    }
    moe = {**FOUR, 'moe_branches': branches, 'expert_init': expert_init}
    model = build_head(moe, init_cfg=config, feat_channels=16)
    model.init_weights()
    heads = [expert.retina_cls for expert in model.cls_moe.experts] if 'cls' in branches else []
    for predictor in heads or [model.retina_cls]:
        torch.testing.assert_close(predictor.bias.sigmoid(), torch.full((12,), 0.01))
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == sum(3 * (4 if b in branches else 1) for b in ('cls', 'reg'))
    for conv in convs:
        # At least 864 numbers: the standard error of their std is 2.4 % of it.
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.12)
    if 'reg' in branches:
        weights = [expert.retina_reg.weight for expert in model.reg_moe.experts]
        assert torch.equal(weights[0], weights[1]) == (expert_init == 'shared')
        assert not any(expert.retina_reg.bias.any() for expert in model.reg_moe.experts)


@pytest.mark.parametrize('branches', [(), ('obj',), ('cls', 'obj')])
def test_unknown_branches_are_refused(branches):
    with pytest.raises(ConfigError, match=r"moe_branches=.* must name 'cls', 'reg' or both"):
        build_head({'moe_branches': branches})


@pytest.mark.parametrize('fullgraph', [False, True], ids=['breaks', 'one graph'])
def test_compiled(fullgraph, randomise):
    """The whole network, in one graph or with the breaks of its two sparse layers alone."""
    torch._dynamo.reset()
    counters.clear()
    model = randomise(build_detector(FOUR)).eval()
    layers = model.bbox_head.cls_moe, model.bbox_head.reg_moe
    compiled = torch.compile(model, fullgraph=fullgraph, backend='aot_eager')
    loads = []
    for again in (False, True):
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=again):
            expected = model(images, mode='tensor')
            loads.append([layer.routing.load().tolist() for layer in layers])
            found = compiled(images, mode='tensor')
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert loads[0] != loads[1]
    assert all('call_uncompiled' in reason for reason in counters['graph_break'])
    assert bool(counters['graph_break']) != fullgraph
