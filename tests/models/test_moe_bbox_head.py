"""The MoE box head against MMDetection's with the same weights, alone and in a detector."""

import copy

import pytest
import torch
from copies import check_detections, check_gradients, check_same
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint, load_state_dict
from tiny_models import CLASSES, FOUR, faster_config, two_images
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ImportanceLoss, find_moe_layers

C, SIZE, HIDDEN = 6, 3, 8
HEAD = {
    'in_channels': C,
    'fc_out_channels': HIDDEN,
    'roi_feat_size': SIZE,
    'num_classes': CLASSES,
}


def build_head(moe=None, **options):
    name = 'mmdet.Shared2FCBBoxHead' if moe is None else 'mmdet_moe.MoEShared2FCBBoxHead'
    return MODELS.build({**HEAD, **options, **(moe or {}), 'type': name})


def build_detector(moe=None, **proposals):
    """With few proposals."""
    config = faster_config(moe)
    config.train_cfg.rcnn.sampler.num = 32
    config.train_cfg.rpn_proposal.update(max_per_img=50, **proposals)
    config.test_cfg.rpn.update(max_per_img=50, **proposals)
    config.test_cfg.rcnn.score_thr = 0.0
    return MODELS.build(config)


@pytest.mark.parametrize('options', [{}, {'with_avg_pool': True}, {'reg_class_agnostic': True}])
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
def test_same_as_dense(moe, options, randomise, tmp_path):
    dense, model = randomise(build_head(**options)), randomise(build_head(moe, **options)).eval()
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'))
    check_same(dense, model, torch.randn(30, C, SIZE, SIZE))


def test_different_experts(randomise):
    """Every RoI: its own mixture of the experts' hidden features."""
    model = randomise(build_head(FOUR)).double().eval()
    rois = torch.randn(20, C, SIZE, SIZE).double()
    cls_score, bbox_pred = model(rois)
    layer = model.shared_fcs
    assert (layer.routing.items_per_level, layer.routing.num_images) == ((20,), 20)
    state = layer.experts.state_dict()
    for t, roi in enumerate(rois):
        logits = roi.mean((1, 2)) @ layer.router.fc.weight.T + layer.router.fc.bias
        weights, chosen = logits.topk(2)
        features = 0
        for weight, e in zip(weights.softmax(0), chosen.tolist(), strict=True):
            hidden = (state['0.weight'][e] @ roi.flatten() + state['0.bias'][e]).clamp(min=0)
            hidden = (state['1.weight'][e] @ hidden + state['1.bias'][e]).clamp(min=0)
            features = features + weight * hidden
        torch.testing.assert_close(cls_score[t], model.fc_cls(features), rtol=0, atol=1e-10)
        torch.testing.assert_close(bbox_pred[t], model.fc_reg(features), rtol=0, atol=1e-10)


@pytest.mark.parametrize('with_cls', [True, False])
def test_one_prediction_only(with_cls):
    model = build_head(FOUR, with_cls=with_cls, with_reg=not with_cls)
    predictions = model(torch.randn(5, C, SIZE, SIZE))
    assert (predictions[0] is None, predictions[1] is None) == (not with_cls, with_cls)


@pytest.mark.parametrize('options', [{}, {'with_avg_pool': True}])
@pytest.mark.parametrize('constraint', [None, {'type': 'mmdet_moe.RelativeImportanceConstraint'}])
def test_no_rois(options, constraint):
    """No gradient is missing: another rank may have RoIs."""
    moe = {**FOUR, 'router': {'constraint': constraint}, 'capacity_factor': 1.25}
    model = build_head(moe, **options)
    cls_score, bbox_pred = model(torch.zeros(0, C, SIZE, SIZE))
    assert (cls_score.shape, bbox_pred.shape) == ((0, CLASSES + 1), (0, 4 * CLASSES))
    loss = ImportanceLoss()(model.shared_fcs.routing)
    (cls_score.sum() + bbox_pred.sum() + loss).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    if constraint:
        assert not model.shared_fcs.router.constraint.relative_importance.any()


class TestInitialisation:
    def bounds(self, model, width):
        """The largest absolute weight of every expert's layers, by those of Xavier's formula."""
        for i, inputs in enumerate((C * SIZE * SIZE, width)):
            layer = model.shared_fcs.experts.layers[i]
            bound = (6 / (inputs + width)) ** 0.5
            assert layer.weight.shape == (4, width, inputs)
            yield layer, layer.weight.abs().amax((1, 2)) / bound

    @pytest.mark.parametrize('expert_init', ['shared', 'independent'])
    def test_of_the_dense_head(self, expert_init):
        model = build_head({**FOUR, 'expert_init': expert_init}, fc_out_channels=64)
        model.init_weights()
        for layer, share in self.bounds(model, 64):
            assert torch.all((share > 0.99) & (share <= 1))
            assert not layer.bias.any()
            for e in (1, 2, 3):
                assert torch.equal(layer.weight[e], layer.weight[0]) == (expert_init == 'shared')
        # 256 and 768 numbers: the standard error of their std is at most 4.4 % of it.
        assert model.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert model.fc_reg.weight.std().item() == pytest.approx(0.001, rel=0.2)
        # The router keeps its own: Xavier's values would be 60 times as large.
        assert model.shared_fcs.router.fc.weight.abs().max() < 0.06
        assert not model.shared_fcs.router.noise_fc.weight.any()

    @pytest.mark.parametrize(
        'init_cfg',
        [
            {'type': 'Constant', 'val': 0.25, 'override': {'name': 'shared_fcs'}},
            {'type': 'Constant', 'layer': 'Linear', 'val': 0.25},
            [
                {
                    'type': 'Normal',
                    'override': [
                        {'name': 'shared_fcs', 'type': 'Constant', 'val': 0.25},
                        {'name': 'fc_cls', 'type': 'Constant', 'val': 0.5},
                    ],
                }
            ],
        ],
        ids=['override', 'layer', 'override with a type'],
    )
    def test_by_config(self, init_cfg):
        dense, model = build_head(init_cfg=init_cfg), build_head(FOUR, init_cfg=init_cfg)
        dense.init_weights(), model.init_weights()
        for layer in model.shared_fcs.experts.layers:
            assert torch.all(layer.weight == 0.25)
        router = model.shared_fcs.router  # equal weights would choose the same experts for ever
        assert router.fc.weight.std() > 0
        assert not router.noise_fc.weight.any()
        if 'fc_cls' in str(init_cfg):
            assert torch.equal(model.fc_cls.weight, dense.fc_cls.weight)
            assert torch.all(model.fc_cls.weight == 0.5)

    def test_from_a_dense_checkpoint(self, randomise, tmp_path):
        dense = randomise(build_head())
        torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
        init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'dense.pth')}
        model = build_head({**FOUR, 'expert_init': 'independent'}, init_cfg=init_cfg)
        model.init_weights()
        for name, value in dense.shared_fcs.state_dict().items():
            for copied in model.shared_fcs.experts.state_dict()[name]:
                assert torch.equal(copied, value)


class TestDetector:
    def losses(self, model, images, samples):
        torch.manual_seed(5)  # the sampling of anchors and RoIs is random
        return model(images.double(), copy.deepcopy(samples), mode='loss')

    @pytest.mark.parametrize('moe', [{'num_experts': 1, 'top_k': 1}, FOUR], ids=str)
    def test_copies_have_the_dense_losses(self, moe, randomise):
        # Without noise no random numbers are drawn between the samplings.
        moe = {**moe, 'router': {'noise': False}}
        dense, model = randomise(build_detector()), randomise(build_detector(moe))
        load_state_dict(model, dense.state_dict())
        dense, model = dense.double().train(), model.double().train()
        images, samples = two_images()
        expected, losses = (self.losses(m, images, samples) for m in (dense, model))
        assert {'loss_cls', 'loss_bbox', 'loss_rpn_cls'} <= set(losses)
        assert losses['loss_bbox'] > 0.01
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)
        for result in (expected, losses):
            (result['loss_cls'] + result['loss_bbox'] + sum(result['loss_rpn_cls'])).backward()
        check_gradients(dense.roi_head, model.roi_head)

    def test_copies_have_the_dense_detections(self, randomise):
        dense, model = randomise(build_detector()), randomise(build_detector(FOUR))
        load_state_dict(model, dense.state_dict())
        check_detections(dense, model, *two_images())

    def test_trains_a_step(self):
        model = build_detector({**FOUR, 'expert_init': 'independent'})
        model.init_weights()
        assert list(find_moe_layers(model)) == ['roi_head.bbox_head.shared_fcs']
        layer = model.roi_head.bbox_head.shared_fcs
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        before = copy.deepcopy(layer.state_dict())
        losses = model.train()(*two_images(), mode='loss')
        losses['loss_moe'] = ImportanceLoss()(layer.routing)
        assert layer.routing.num_items == 2 * 32
        total, _ = model.parse_losses(losses)
        total.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        for name, value in layer.state_dict().items():
            if 'noise' not in name:
                assert not torch.equal(value, before[name]), name
        with torch.no_grad():
            detections = model.eval()(*two_images(), mode='predict')
        assert all(len(sample.pred_instances) > 0 for sample in detections)

    def test_no_proposals(self):
        """Neither from the RPN nor, in training, from objects."""
        model = build_detector(FOUR, min_bbox_size=1000)
        losses = model.train()(*two_images(boxes=False), mode='loss')
        assert model.roi_head.bbox_head.shared_fcs.routing.num_items == 0
        total, _ = model.parse_losses(losses)
        total.backward()
        for parameter in model.roi_head.bbox_head.shared_fcs.parameters():
            assert not parameter.grad.any()
        with torch.no_grad():
            detections = model.eval()(*two_images(), mode='predict')
        assert [len(sample.pred_instances) for sample in detections] == [0, 0]


def test_noise_perturbs_the_copies(randomise):
    dense = randomise(build_head(fc_out_channels=64))
    model = build_head({**FOUR, 'upcycle_noise': 0.1}, fc_out_channels=64)
    load_state_dict(model, dense.state_dict())
    weight = dense.shared_fcs[1].weight
    copies = model.shared_fcs.experts.layers[1].weight
    for copied in copies:
        # 4096 numbers: the standard error of their std is 1.1 % of it.
        assert ((copied - weight).std() / weight.std()).item() == pytest.approx(0.1, rel=0.06)
    assert not torch.equal(copies[0], copies[1])


def test_dense_parts_are_unchanged():
    """The head's own layers are those of MMDetection, under the same names."""
    names = {name for name, _ in build_head().named_parameters() if 'shared' not in name}
    model = build_head(FOUR)
    assert names == {name for name, _ in model.named_parameters() if 'shared' not in name}
    assert isinstance(model.fc_cls, nn.Linear)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ({'width': 'equal'}, "no option width='equal'; leave it out"),
        ({'residual': True}, 'no option residual=True; leave it out'),
        ({'shared': 1}, 'no option shared=1; leave it out'),
        ({'impl': 'loop'}, "no option impl='loop'; leave it out"),
        (
            {'decision_weight': 'positives'},
            "counts anchors, of which RoIs have none; use 'uniform'",
        ),
    ],
)
def test_options_that_its_experts_do_not_have(option, message):
    with pytest.raises(ConfigError, match=message):
        MODELS.build(dict(type='mmdet_moe.MoEShared2FCBBoxHead', num_classes=3, **option))
