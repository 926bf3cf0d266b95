"""Class activation maps of single experts against formulas, and against autograd by hand."""

import numpy as np
import pytest
import torch
from tiny_models import build_single, make_batch
from torch import nn

from mmdet_moe.analysis import saliency
from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.saliency import Target, check_captum, expert_cam, has_maps
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.mumoe import MuMoEConv1x1

pytest.importorskip('captum')


class Classifier(nn.Module):
    """Classes from the mean over what one layer makes of the image."""

    def __init__(self, layer, channels, classes=3):
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(channels, classes)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.fc(self.layer(inputs).mean((2, 3)))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(1, 4, 6, 8)


def grad_cam(x, gradient):
    """``ReLU(sum_c mean_hw(G_c) A_c)`` of one image."""
    return torch.relu(torch.einsum('c,chw->hw', gradient.mean((1, 2)), x[0])).detach().numpy()


def sparse(granularity='image', **options):
    experts = [nn.Conv2d(4, 5, 1) for _ in range(3)]
    return MoELayer(experts, 3, 2, in_channels=4, granularity=granularity, **options).eval()


def test_linear_experts_by_formula(x):
    """``logit_k = mean_hw(V_k sum_e w_e W_e x) + ...``, so ``G = w_e W_e^T V_k / HW`` for each e;
    the shortcut and the shared expert, which add to the logit as well, have no part in it.
    """
    layer = sparse(shortcut=nn.Conv2d(4, 5, 1), shared=[nn.Conv2d(4, 5, 1)])
    model = Classifier(layer, 5).eval()
    before = model(x)
    routing = layer.routing
    for expert, weight in zip(routing.expert_ids[0].tolist(), routing.weights[0], strict=True):
        cam, what = expert_cam(model, {'inputs': x}, layer, Target(2, expert))
        kernel = layer.experts[expert].weight[:, :, 0, 0]
        gradient = weight / 2 * (model.fc.weight[2] @ kernel) / 48  # half: the shared expert
        assert what == 'logit'
        expected = grad_cam(x, gradient[:, None, None].expand(4, 6, 8))
        np.testing.assert_allclose(cam, expected, rtol=1e-4, atol=1e-7)
    (unused,) = set(range(3)) - set(routing.expert_ids[0].tolist())
    assert not expert_cam(model, {'inputs': x}, layer, Target(2, unused))[0].any()
    # The model is as it was.
    assert torch.equal(model(x), before)
    assert not layer._forward_pre_hooks
    assert not layer.shortcut._forward_hooks
    assert 'run_experts' not in vars(layer)


@pytest.mark.parametrize('whole_maps', [False, True])
@pytest.mark.parametrize('options', [{'grid_size': 2}, {}], ids=['patch', 'pixel'])
def test_items_have_their_own_weights(x, options, whole_maps):
    """``G(h, w) = w_e(h, w) W_e^T V_k / HW``, 0 where the expert was not chosen."""
    layer = sparse('patch' if options else 'pixel', whole_maps=whole_maps, **options)
    nn.init.normal_(layer.router.fc.weight)  # which has a gradient that must not be seen
    model = Classifier(layer, 5).eval()
    model(x)
    weights = layer.routing.dense_weights()  # row by row
    grid = weights.reshape(2, 2, 3) if options else weights.reshape(6, 8, 3)
    if options:
        grid = grid.repeat_interleave(3, 0).repeat_interleave(4, 1)
    for expert in range(3):
        kernel = layer.experts[expert].weight[:, :, 0, 0]
        gradient = torch.einsum('hw,c->chw', grid[..., expert], model.fc.weight[0] @ kernel) / 48
        cam, _ = expert_cam(model, {'inputs': x}, layer, Target(0, expert))
        np.testing.assert_allclose(cam, grad_cam(x, gradient), rtol=1e-4, atol=1e-7)


def test_factorised_experts_by_formula(x):
    """``y = sum_e a_e (W_e x + b_e)`` at every pixel; the W_e are read off unit vectors."""
    layer = MuMoEConv1x1(4, 5, num_experts=3, rank=4).eval()
    nn.init.normal_(layer.gate.weights[0])
    model = Classifier(layer, 5).eval()
    rows = x[0].flatten(1).T
    (coefficients,) = layer.coefficients(rows)
    for expert in range(3):
        alone = torch.zeros(5, 3)
        alone[:, expert] = 1
        mixed = layer.mix(torch.cat([torch.eye(4), torch.zeros(1, 4)]), (alone,))
        matrix = mixed[:4] - mixed[4]  # W_e transposed
        weight = coefficients[:, expert].reshape(6, 8)
        gradient = torch.einsum('hw,c->chw', weight, matrix @ model.fc.weight[1]) / 48
        cam, _ = expert_cam(model, {'inputs': x}, layer, Target(1, expert))
        np.testing.assert_allclose(cam, grad_cam(x, gradient), rtol=1e-3, atol=1e-6)


def test_detection_against_autograd(randomise):
    """With one expert, whose weight is 1, the score's gradient at the branch's own input; the box
    of a branch that has no part in the score.
    """
    model = randomise(build_single('moe retina')).eval()
    for name in ('cls_moe', 'reg_moe'):
        layer = getattr(model.bbox_head, name)
        layer.router.top_k = layer.top_k = 1
    data = model.data_preprocessor(make_batch(1), False)
    with Tracer(model) as tracer:
        (result,) = tracer.predict(data, preprocessed=True)
        found = result.pred_instances
        places = tracer.detection_places(0, found)
        chosen = {n: tracer.decisions(n, 1).weights[tracer.items(n, places)] for n in tracer.layers}
    best = int(found.scores.argmax())
    level, label = int(places.level[best]), int(found.labels[best])
    assert float(chosen['bbox_head.cls_moe'][best].max()) == 1
    features = [f.detach().requires_grad_() for f in model.extract_feat(data['inputs'])]
    scores, _ = model.bbox_head(features)
    scores = scores[level].unflatten(1, (-1, 3))[:, :, label].sigmoid().flatten()
    score = scores[(scores - found.scores[best]).abs().argmin()]  # that of its anchor
    assert score.item() == pytest.approx(found.scores[best].item())
    (gradient,) = torch.autograd.grad(score, features[level])
    expected = torch.relu((gradient * features[level]).sum(1))[0].detach().numpy()
    layer = model.bbox_head.cls_moe
    expert = int(chosen['bbox_head.cls_moe'][best].argmax())
    cam, what = expert_cam(model, data, layer, Target(best, expert, level))
    assert what == 'score'
    assert expected.max() > 0
    np.testing.assert_allclose(cam, expected, rtol=1e-3, atol=1e-7 + 1e-4 * expected.max())
    expert = int(chosen['bbox_head.reg_moe'][best].argmax())
    cam, what = expert_cam(model, data, model.bbox_head.reg_moe, Target(best, expert, level))
    assert what == 'box'
    assert cam.max() > 0
    assert not result.pred_instances.scores.requires_grad  # the caller's predictions


def test_who_has_maps():
    layer = sparse()
    assert not has_maps('backbone.layer4', layer, None)
    token = MoELayer(nn.Linear(4, 4), 2, 1, in_channels=4, granularity='token')
    assert not has_maps('encoder.ffn', token, object())
    assert not has_maps('roi_head.bbox_head', layer, object())


def test_captum_is_asked_for(monkeypatch):
    monkeypatch.setattr(saliency, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r'--cam needs captum.*mmdet_moe\[cam\]'):
        check_captum('--cam')
