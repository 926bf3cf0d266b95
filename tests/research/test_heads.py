"""Heads on cached features: their training, and what each expert is good for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_moe.moe import CPMuMoE, TRMuMoE, add_experts
from research.heads import (
    Data,
    Recipe,
    accuracy,
    look_at_experts,
    predict,
    train_head,
    without_each,
)


def sparse(num_experts=4):
    model = nn.Sequential(nn.Linear(6, 3))
    entry = dict(at='0', granularity='token', num_experts=num_experts, expert_init='independent')
    add_experts(model, [entry], dict(type='mmdet_moe.GAPRouter'))
    return model[0]


HEADS = {
    'CP': lambda: CPMuMoE(6, 3, 4, 5),
    'two levels': lambda: CPMuMoE(6, 3, (2, 3), 5),
    'TR': lambda: TRMuMoE(6, 3, 4, 2),
    'sparse': sparse,
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 6, generator=generator)
    return Data(features, (features @ torch.randn(6, 3, generator=generator)).argmax(1))


def untrained(kind):
    torch.manual_seed(1)
    head = HEADS[kind]().eval()
    if hasattr(head, 'gate'):
        for weight in head.gate.weights:
            nn.init.normal_(weight, std=2.0)
    return head


@pytest.mark.parametrize('kind', HEADS)
def test_training_learns_and_repeats(kind, data):
    recipe = Recipe(lr=0.03, epochs=12, batch_size=64)
    heads = [untrained(kind) for _ in range(2)]
    losses = [train_head(head, data, recipe, seed=3) for head in heads]
    assert losses[0] == losses[1]
    assert accuracy(predict(heads[0], data.features), data.labels) > 0.8
    assert not heads[0].training


def test_weights_of_images(data):
    """An image of weight 0 is as if it were not there."""
    wrong = data.labels.clone()
    wrong[::2] = 0
    weights = torch.ones(300)
    weights[::2] = 0
    linear = nn.Linear(6, 3)
    train_head(linear, Data(data.features, wrong, weights), Recipe(0.03, 0.0, 20, 50), seed=0)
    assert accuracy(predict(linear, data.features), data.labels) > 0.9


@pytest.mark.parametrize('kind', HEADS)
def test_an_expert_is_zeroed(kind, data):
    """Against the sum of what all experts say, each by itself."""
    head, x = untrained(kind), data.features
    with torch.no_grad():
        if kind == 'sparse':
            whole = head(x)
            weights = head.routing.dense_weights()
            said = [
                F.linear(x, w, b)
                for w, b in zip(head.experts.weight, head.experts.bias, strict=True)
            ]
        else:
            joint = head.coefficients(x)
            weights = joint[0]
            for a in joint[1:]:
                weights = (weights[:, :, None] * a[:, None]).flatten(1)
            materialised = head.experts.materialise().flatten(0, len(head.levels) - 1)
            said = [x @ w[:-1] + w[-1] for w in materialised]
            whole = head(x)
    contributions = torch.stack(said, 1) * weights[..., None]
    torch.testing.assert_close(contributions.sum(1), whole, rtol=1e-4, atol=1e-4)
    for expert, rows, logits in without_each(head, x):
        assert torch.equal(rows, weights[:, expert].nonzero()[:, 0])
        expected = (whole - contributions[:, expert])[rows]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert expert == len(said) - 1


class OneExpertPerClass(CPMuMoE):
    """Expert c says class c, and only of its images; what is left are their noisy features."""

    def coefficients(self, x):
        return (F.one_hot(x.argmax(1), 5).float(),)


def test_experts_of_one_class_each():
    """Each loses all images of one class and no other: 0, where chance spreads its losses."""
    head = OneExpertPerClass(5, 5, 5, 5, bias=False)
    eye = torch.eye(5)
    head.experts.load_state_dict({f'factors.{i}': eye for i in range(3)})
    features = eye.repeat(20, 1)
    # Without any logits class 0 is said, so that its expert is never missed.
    found = look_at_experts(head, Data(features, features.argmax(1)), seed=0)
    assert found['values'] == [None, 0, 0, 0, 0]
    assert found['lost'] == [0, 20, 20, 20, 20]
    assert found['won'] == [0] * 5
    assert found['items'] == [20] * 5
    assert found['num_images'] == 100
    assert min(found['by_chance'][1:]) > 0.8
