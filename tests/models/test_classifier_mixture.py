"""A mixture of whole classifiers against a dense computation by hand."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import ImageClassifier, MobileNetV2
from mmpretrain.structures import DataSample
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models import MobileNetV2_CIFAR

EXPERT = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, in_channels=2, stem_channels=4, base_channels=4
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
)  # fmt: skip
ROUTER = dict(type='mmdet_moe.ConvGAPRouter', conv_channels=8, noise='uniform', softmax='over_all')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def mixture(randomise=None, **options):
    cfg = dict(type='mmdet_moe.ClassifierMixture', expert=EXPERT, in_channels=2, router=ROUTER)
    model = MODELS.build({**cfg, **options})
    if randomise is not None:
        randomise(model.moe.experts)
        # So that all experts are chosen.
        nn.init.normal_(model.moe.router.fc.weight, std=10.0)
    return model


def batch(num=12, size=8):
    x = torch.randn(num, 2, size, size) * torch.rand(num, 2, 1, 1) * 3
    samples = [DataSample().set_gt_label(i % 3) for i in range(num)]
    for i, sample in enumerate(samples):
        sample.set_field(i % 4, 'cluster')
    return x, samples


def scores_of(expert, x):
    return expert.head.fc(expert.backbone(x)[0].mean((2, 3)))


def logits_by_hand(router, x):
    features = F.conv2d(x, router.conv.weight, router.conv.bias, padding=1).relu().mean((2, 3))
    return features @ router.fc.weight.T + router.fc.bias


def dense_by_hand(model, x, top_k=1):
    """Every expert on every image; those that were not chosen count 0."""
    probabilities = logits_by_hand(model.moe.router, x).softmax(1)
    best = probabilities.topk(top_k).indices
    weights = torch.zeros_like(probabilities).scatter(1, best, probabilities.gather(1, best))
    every = torch.stack([scores_of(expert, x) for expert in model.moe.experts], dim=1)
    return (weights[:, :, None] * every).sum(1), best


@pytest.mark.parametrize('top_k', [1, 2])
def test_against_a_dense_computation(top_k, randomise):
    model = mixture(randomise, top_k=top_k).eval()
    x, samples = batch()
    expected, best = dense_by_hand(model, x, top_k)
    assert len(set(best.flatten().tolist())) > 2
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    loss = model(x, samples, mode='loss')['loss']
    reference = F.cross_entropy(expected, torch.arange(12) % 3)
    torch.testing.assert_close(loss, reference)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values())
    by_hand = torch.autograd.grad(reference, parameters.values())
    for name, gradient, expected_gradient in zip(parameters, found, by_hand, strict=True):
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f'{n}: {m}'
        )


def test_training_normalises_each_expert_over_its_own_images(randomise):
    model = mixture(randomise).train()
    x, _ = batch(16, size=16)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    probabilities = (logits_by_hand(model.moe.router, x) + torch.rand(16, 4)).softmax(1)
    weights, chosen = probabilities.max(1)
    assert len(set(chosen.tolist())) > 1
    for e, expert in enumerate(model.moe.experts):
        mine = chosen == e
        if mine.any():
            expected = weights[mine, None] * scores_of(expert, x[mine])
            torch.testing.assert_close(y[mine], expected, rtol=1e-3, atol=1e-4)


def test_predictions_and_their_metrics(randomise):
    model = mixture(randomise).eval()
    x, samples = batch()
    expected, best = dense_by_hand(model, x)
    results = model(x, samples, mode='predict')
    for i, sample in enumerate(results):
        torch.testing.assert_close(sample.pred_score, expected[i].softmax(0))
        assert sample.pred_label.item() == expected[i].argmax().item()
        assert sample.expert_ids.tolist() == best[i].tolist()
    evaluator = Evaluator([dict(type='Accuracy'), dict(type='mmdet_moe.DispatchEntropy')])
    evaluator.process(results)
    metrics = evaluator.evaluate(12)
    correct = (expected.argmax(1) == torch.arange(12) % 3).float().mean()
    assert metrics['accuracy/top1'] == pytest.approx(100 * correct.item())
    counts = torch.zeros(4, 4).index_put_((best[:, 0], torch.arange(12) % 4), torch.ones(12), True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropies = -(shares * shares.clamp(min=1e-12).log()).sum(1)
    by_hand = (entropies * counts.sum(1) / 12).sum()
    assert metrics['moe/dispatch_entropy'] == pytest.approx(by_hand.item(), abs=1e-5)
    # Without data samples, as for inference.
    assert model(x, mode='predict')[3].expert_ids.tolist() == best[3].tolist()


def test_a_single_classifier_is_a_mixture_of_one(randomise):
    model = mixture(randomise, num_experts=1).train()
    single = MODELS.build(EXPERT).train()
    single.load_state_dict(model.moe.experts[0].state_dict())
    x, samples = batch()
    loss = model(x, samples, mode='loss')['loss']
    reference = single(x, samples, mode='loss')['loss']
    torch.testing.assert_close(loss, reference)
    loss.backward()
    assert not model.moe.router.fc.weight.grad.any()


def test_a_single_classifier_loads_into_the_mixture(randomise):
    single = randomise(MODELS.build(EXPERT)).eval()
    model = mixture(num_experts=3, top_k=2, router=dict(type='mmdet_moe.GAPRouter')).eval()
    missing, unexpected = model.load_state_dict(single.state_dict(), strict=False)
    assert {name.split('.')[1] for name in missing} == {'router'}
    assert not unexpected
    x, _ = batch()
    # The two weights sum to 1.
    torch.testing.assert_close(model(x), single(x), rtol=1e-4, atol=1e-5)
    again = mixture(num_experts=3, top_k=2, router=dict(type='mmdet_moe.GAPRouter'))
    again.load_state_dict(model.state_dict())


def test_initial_weights():
    independent, shared = (mixture(expert_init=kind) for kind in ('independent', 'shared'))
    for model in (independent, shared):
        model.init_weights()
        first, second = (expert.backbone.layer1[0].conv1.weight for expert in model.moe.experts[:2])
        assert torch.equal(first, second) == (model is shared)
        # Kaiming's of the backbone, as in a single classifier: fan-out 4 · 9.
        assert first.std().item() == pytest.approx((2 / 36) ** 0.5, rel=0.25)


def test_preprocessor():
    model = mixture(data_preprocessor=dict(mean=[1.0, 2.0], std=[2.0, 4.0]))
    data = dict(inputs=torch.full((1, 2, 4, 4), 5, dtype=torch.uint8))
    normalised = model.data_preprocessor(data)['inputs']
    assert normalised[0, :, 0, 0].tolist() == [2.0, 0.75]


def test_refused():
    headless = {**EXPERT, 'head': None}
    with pytest.raises(ConfigError, match='expert: ImageClassifier has no head'):
        mixture(expert=headless)
    with pytest.raises(ConfigError, match='expert: MobileNetV2 has no head'):
        mixture(expert=dict(type='MobileNetV2'))
    stacked = dict(type='mmdet_moe.LinearExperts', in_features=2, out_features=3)
    with pytest.raises(ConfigError, match='expert: LinearExperts has no head'):
        mixture(expert=stacked)
    with pytest.raises(ConfigError, match='top_k=5 must lie between 1 and num_experts=4'):
        mixture(top_k=5)
    head = dict(type='LinearClsHead', num_classes=3, in_channels=32)
    with pytest.raises(ConfigError, match='head: LinearClsHead has weights of its own'):
        mixture(head=head)
    message = r'in_channels=2 wants inputs \(N, 2, H, W\), got \(1, 3, 8, 8\); set model.in_ch'
    with pytest.raises(ConfigError, match=message):
        mixture()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="mode='scores' is unknown"):
        mixture()(torch.zeros(1, 2, 8, 8), mode='scores')


def test_mobilenet_for_small_images(randomise):
    small = randomise(MobileNetV2_CIFAR(widen_factor=0.5))
    usual = MobileNetV2(widen_factor=0.5)
    # Weights fit each other: strides have none.
    usual.load_state_dict(small.state_dict())
    for model in (small, usual):
        model.eval()
    x = torch.randn(2, 3, 32, 32)
    (y,) = small(x)
    assert y.shape == (2, 1280, 4, 4)
    # With the two strides it is the usual one again.
    small.conv1.conv.stride = (2, 2)
    small.layer2[0].conv[1].conv.stride = (2, 2)
    torch.testing.assert_close(small(x), usual(x))
    grey = MobileNetV2_CIFAR(in_channels=1, widen_factor=0.25)
    grey.train()
    # A single image in training, as an expert may get it.
    assert torch.isfinite(grey(torch.randn(1, 1, 28, 28))[0]).all()


def test_mobilenets_as_experts():
    expert = dict(
        EXPERT,
        backbone=dict(type='mmdet_moe.MobileNetV2_CIFAR', in_channels=2, widen_factor=0.25),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=1280),
    )
    model = mixture(expert=expert)
    assert all(isinstance(e, ImageClassifier) for e in model.moe.experts)
    x, samples = batch(6, size=28)
    model.train()
    assert torch.isfinite(model(x, samples, mode='loss')['loss'])
