"""Hard constraints and the balancing bias, simulated batch by batch by hand."""

import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    BiasBalancing,
    GAPRouter,
    MeanImportanceConstraint,
    MoELayer,
    RelativeImportanceConstraint,
    Routing,
)

INF = float('inf')


def routing_with(expert_ids, weights, num_experts, decision=None):
    """A Routing with these decisions; its logits play no part here."""
    return Routing(
        expert_ids=torch.tensor(expert_ids),
        weights=torch.tensor(weights),
        logits=torch.zeros(len(expert_ids), num_experts),
        items_per_level=(len(expert_ids),),
        num_images=len(expert_ids),
        decision_weights=torch.tensor(decision or [1.0] * len(expert_ids)),
    )


def router_with(constraint, num_experts=4, top_k=2, **kwargs):
    """A router whose logits are the (first E channels of the) pooled input itself."""
    router = GAPRouter(num_experts, num_experts, top_k, constraint=constraint, **kwargs)
    nn.init.eye_(router.fc.weight)
    return router


def images(logits):
    return torch.tensor(logits)[:, :, None, None]


def test_relative_importance_over_three_batches():
    constraint = RelativeImportanceConstraint(4, threshold=0.5)
    assert constraint.masked().tolist() == [False] * 4
    # T = 4, E = 4: the mean importance is 1. I = (1.75, 1.25, 0.75, 0.25).
    constraint.update(
        routing_with(
            [[0, 1], [0, 1], [1, 2], [0, 3]],
            [[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]],
            4,
        )
    )
    assert constraint.relative_importance.tolist() == [0.75, 0.25, -0.25, -0.75]
    assert constraint.masked().tolist() == [True, False, False, False]
    # T = 2: the mean importance is 1/2. I = (0, 0.75, 0.75, 0.5), r += (-1, 0.5, 0.5, 0).
    constraint.update(routing_with([[1, 2], [2, 3]], [[0.75, 0.25], [0.5, 0.5]], 4))
    assert constraint.relative_importance.tolist() == [-0.25, 0.75, 0.25, -0.75]
    assert constraint.masked().tolist() == [False, True, False, False]
    # T = 1: the mean importance is 1/4. I = (0, 0, 1, 0), r += (-1, -1, 3, -1).
    constraint.update(routing_with([[2, 0]], [[1.0, 0.0]], 4))
    assert constraint.relative_importance.tolist() == [-1.25, -0.25, 3.25, -1.75]
    assert constraint.masked().tolist() == [False, False, True, False]


def test_relative_importance_is_masked_only_above_the_threshold():
    constraint = RelativeImportanceConstraint(4, threshold=0.5)
    constraint.relative_importance.copy_(torch.tensor([0.5, 0.5, -0.5, -0.5]))
    assert not constraint.masked().any()


@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_relative_importance_sums_to_zero(top_k):
    """Also with Switch weights (k = 1), which do not sum to 1."""
    router = GAPRouter(6, 5, top_k, constraint=RelativeImportanceConstraint(5, 0.1))
    nn.init.normal_(router.fc.weight)
    for _ in range(20):
        router.constraint.update(router(torch.randn(7, 6, 2, 2)))
        r = router.constraint.relative_importance
        assert abs(r.sum()) < 1e-4
        assert not router.constraint.masked().all()
    assert r.abs().max() > 0.1


def test_mean_importance_is_the_running_mean():
    constraint = MeanImportanceConstraint(2, threshold=0.25)  # masked above 0.75
    batches = [
        ([[0, 1], [0, 1]], [[0.75, 0.25], [1.0, 0.0]], [0.875, 0.125], [True, False]),
        ([[1, 0]], [[0.5, 0.5]], [(0.875 + 0.5) / 2, (0.125 + 0.5) / 2], [False, False]),
        # Not masked above any more, chosen by all: (0.875 + 0.5 + 1) / 3 = 0.79
        ([[0, 1]] * 4, [[1.0, 0.0]] * 4, [2.375 / 3, 0.625 / 3], [True, False]),
    ]
    for ids, weights, mean, masked in batches:
        constraint.update(routing_with(ids, weights, 2))
        assert constraint.mean_importance.tolist() == pytest.approx(mean, abs=1e-6)
        assert constraint.masked().tolist() == masked
    assert constraint.num_batches.item() == 3


def test_averages_of_weights_count_the_batches():
    """MMEngine's EMA leaves integers as they were in the first iteration."""
    constraint = MeanImportanceConstraint(2)
    average = ExponentialMovingAverage(constraint, momentum=0.5, update_buffers=True)
    for _ in range(3):
        constraint.update(routing_with([[0, 1]], [[0.5, 0.5]], 2))
        average.update_parameters(constraint)
    assert average.module.num_batches.item() == 0.25 * 1 + 0.25 * 2 + 0.5 * 3
    old = {'mean_importance': torch.ones(2), 'num_batches': torch.tensor(7)}
    constraint.load_state_dict(old)
    assert constraint.num_batches.item() == 7


def test_bias_balancing_over_two_batches():
    constraint = BiasBalancing(4, update_rate=0.25)
    # Load (3, 2, 2, 1), mean 2.
    ids, weights = [[0, 1], [0, 2], [1, 0], [3, 2]], [[0.5, 0.5]] * 4
    constraint.update(routing_with(ids, weights, 4))
    assert constraint.bias.tolist() == [-0.25, 0, 0, 0.25]
    # Load (2, 1, 1, 0), mean 1.
    constraint.update(routing_with(ids[:2], weights[:2], 4))
    assert constraint.bias.tolist() == [-0.5, 0, 0, 0.5]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_state_stays_in_float32(dtype):
    """In half precision 256 steps of 1/512 from 8 on would lead nowhere."""
    constraint = BiasBalancing(2, update_rate=1 / 512)
    constraint.bias.fill_(8)
    nn.ModuleList([constraint]).to(dtype)
    for _ in range(256):
        constraint.update(routing_with([[0]], [[1.0]], 2))
    assert constraint.bias.tolist() == [7.5, 8.5]
    assert constraint.double().bias.tolist() == [7.5, 8.5]
    assert constraint.bias.dtype == torch.float64


@pytest.mark.parametrize('training', [True, False])
def test_bias_steers_the_choice_but_not_the_weights(training):
    router = router_with(BiasBalancing(4)).train(training)
    router.constraint.bias.copy_(torch.tensor([-0.5, 0.0, 0.0, 0.5]))
    # Probabilities 0.4, 0.3, 0.2, 0.1; with the bias -0.1, 0.3, 0.2, 0.6: experts 3 and 1.
    routing = router(images([[0.4, 0.3, 0.2, 0.1]]).log())
    assert routing.expert_ids.tolist() == [[3, 1]]
    assert routing.weights[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize('make', [RelativeImportanceConstraint, MeanImportanceConstraint])
@pytest.mark.parametrize(
    ('top_k', 'softmax'), [(2, 'over_chosen'), (2, 'over_all'), (1, 'over_all')]
)
def test_masked_experts_are_not_chosen_in_training(make, top_k, softmax):
    router = router_with(make(4), top_k=top_k, softmax=softmax)
    usage = next(iter(router.constraint.buffers()))
    usage.copy_(torch.tensor([0.9, 0.0, 0.1, 0.0]))
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.5, 2.0, 1.0, 2.5]])
    routing = router(images(logits.tolist()))
    free = logits.clone()
    free[:, 0] = -INF
    best = free.topk(top_k)
    assert routing.expert_ids.tolist() == best.indices.tolist()
    if softmax == 'over_chosen':
        expected = best.values.softmax(-1)
    else:  # over the free experts
        expected = logits[:, 1:].softmax(-1).topk(top_k).values
    torch.testing.assert_close(routing.weights, expected)
    assert torch.equal(routing.logits, logits)

    routing = router.eval()(images(logits.tolist()))
    assert routing.expert_ids.tolist() == logits.topk(top_k).indices.tolist()


def test_fewer_free_experts_than_k():
    """Surplus weights are exactly 0, count as no load, and their experts are not evaluated."""
    layer = MoELayer(
        nn.Conv2d(4, 2, 1), 4, 3, router_with(RelativeImportanceConstraint(4), top_k=3)
    )
    layer.router.constraint.relative_importance.copy_(torch.tensor([2.0, -4.0, 1.0, 1.0]))
    calls = []
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, e=e: calls.append(e))
    x = images([[5.0, -5.0, 4.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    y = layer(x)
    assert layer.routing.weights.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert layer.routing.expert_ids[:, 0].tolist() == [1, 1]
    assert layer.routing.load().tolist() == [0, 2, 0, 0]
    assert layer.routing.importance().tolist() == [0, 2, 0, 0]
    assert calls == [1]
    torch.testing.assert_close(y, layer.experts[1](x))
    # T = 2, E = 4: r += (0 - 1/2) / (1/2) = -1, or (2 - 1/2) / (1/2) = 3.
    assert layer.router.constraint.relative_importance.tolist() == [1.0, -1.0, 0.0, 0.0]
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_layer_at_two_places_of_a_model():
    """Each call is a batch by itself, unless somebody says when a pass begins and ends."""
    constraint = {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 1.0}
    layer = MoELayer(nn.Conv2d(4, 4, 1), 4, 2, {'constraint': constraint}, in_channels=4)
    x = torch.randn(5, 4, 2, 2)
    layer(layer(x))
    assert (layer.routing.num_items, layer.router.constraint.num_batches) == (5, 2)
    layer.begin()
    layer.begin('a model inside')  # is a part of it, and so is its end
    layer(layer(x))
    layer.end('a model inside')
    assert layer.router.constraint.num_batches == 2
    layer.end()
    assert (layer.routing.num_items, layer.router.constraint.num_batches) == (10, 3)
    layer.begin()  # was interrupted
    layer(x)
    layer.begin()
    layer(x)
    layer.end()
    assert (layer.routing.num_items, layer.router.constraint.num_batches) == (5, 4)


def test_the_bias_counts_choices_whose_weight_is_next_to_nothing():
    """120 logits below the best, exp(-120) is 0 in float32; the bias has chosen it all the same."""
    router = router_with(BiasBalancing(2, update_rate=0.25), 2, 1, softmax='over_all')
    router.constraint.bias.copy_(torch.tensor([0.0, 1.5]))
    layer = MoELayer(nn.Conv2d(2, 2, 1), 2, 1, router)
    layer(images([[120.0, 0.0]] * 3))
    assert layer.routing.expert_ids.tolist() == [[1]] * 3
    assert router.constraint.bias.tolist() == [0.25, 1.25]
    # What was removed is no choice: loads 2, 1 and 0 around a mean of 1.
    constraint = BiasBalancing(3, update_rate=0.25)
    routing = routing_with([[0, 2], [0, 1]], [[1.0, 0.0], [0.5, 0.5]], 3)
    routing.logits = torch.tensor([0.0, 0.0, -INF]).expand(2, 3)
    constraint.update(routing)
    assert constraint.bias.tolist() == [-0.25, 0, 0.25]


@pytest.mark.parametrize(
    'make', [RelativeImportanceConstraint, MeanImportanceConstraint, BiasBalancing]
)
class TestEveryConstraint:
    def layer(self, make):
        constraint = {'type': f'mmdet_moe.{make.__name__}'}
        layer = MoELayer(nn.Conv2d(3, 2, 1), 4, 2, {'constraint': constraint}, in_channels=3)
        nn.init.normal_(layer.router.fc.weight)
        return layer

    def state(self, layer):
        return {k: v.clone() for k, v in layer.router.constraint.state_dict().items()}

    def test_no_update_in_evaluation(self, make):
        layer = self.layer(make).eval()
        before = self.state(layer)
        layer(torch.randn(5, 3, 2, 2))
        after = self.state(layer)
        assert before
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_one_update_per_training_batch_after_the_choice(self, make):
        layer, x = self.layer(make), torch.randn(5, 3, 2, 2)
        untouched = layer.router(x)  # the router alone decides and remembers nothing
        assert not any(v.any() for v in self.state(layer).values())
        layer(x)
        assert torch.equal(layer.routing.expert_ids, untouched.expert_ids)
        expected = make(4)
        expected.update(untouched)
        for key, value in expected.state_dict().items():
            assert torch.equal(self.state(layer)[key], value)
            assert value.any()

    def test_state_dict_restores_the_decisions(self, make):
        layer, data = self.layer(make), torch.randn(6, 8, 3, 2, 2)
        for x in data[:3]:
            layer(x)
        resumed = self.layer(make)
        resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
        for x in data[3:]:
            torch.testing.assert_close(resumed(x), layer(x), rtol=0, atol=0)
            assert torch.equal(resumed.routing.expert_ids, layer.routing.expert_ids)
            assert torch.equal(resumed.routing.weights, layer.routing.weights)
        for key, value in self.state(layer).items():
            assert torch.equal(self.state(resumed)[key], value)

    def test_one_sample_and_one_expert(self, make):
        constraint = make(1)
        constraint.update(routing_with([[0]], [[1.0]], 1))
        assert all(value.isfinite().all() for value in constraint.buffers())
        logits = torch.tensor([[3.0]])
        assert constraint.select(logits, training=True).isfinite().all()

    def test_all_samples_alike(self, make):
        layer = self.layer(make)
        x = torch.randn(1, 3, 2, 2).expand(6, -1, -1, -1)
        for _ in range(5):
            layer(x)
            assert layer.routing.weights.isfinite().all()
            assert (layer.routing.weights.sum(1) - 1).abs().max() < 1e-6
            assert (layer.routing.expert_ids == layer.routing.expert_ids[0]).all()

    def test_decision_weights(self, make):
        ids, weights = [[0, 1], [2, 1], [3, 0]], [[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]]
        weighed, repeated = make(4), make(4)
        weighed.update(routing_with(ids, weights, 4, decision=[2.0, 0.0, 1.0]))
        repeated.update(
            routing_with([ids[0], ids[0], ids[2]], [weights[0], weights[0], weights[2]], 4)
        )
        for key, value in repeated.state_dict().items():
            torch.testing.assert_close(weighed.state_dict()[key], value)

    def test_a_batch_that_counts_nothing_changes_nothing(self, make):
        constraint = make(2)
        constraint.update(routing_with([[0, 1], [0, 1]], [[0.75, 0.25], [0.5, 0.5]], 2))
        constraint.update(routing_with([[0]], [[0.75]], 2))
        before = copy.deepcopy(constraint.state_dict())
        constraint.update(routing_with([[0, 1]], [[0.75, 0.25]], 2, decision=[0.0]))
        for key, value in constraint.state_dict().items():
            assert torch.equal(before[key], value)


@pytest.mark.parametrize(
    ('make', 'options', 'message'),
    [
        (RelativeImportanceConstraint, {'threshold': -0.1}, 'threshold=-0.1 must be a finite'),
        (MeanImportanceConstraint, {'threshold': -1}, 'threshold=-1 must be a finite'),
        (MeanImportanceConstraint, {'threshold': float('nan')}, 'threshold=nan must be a finite'),
        (BiasBalancing, {'update_rate': 0}, 'update_rate=0 must be .* greater than 0'),
    ],
)
def test_refused(make, options, message):
    with pytest.raises(ConfigError, match=f'{make.__name__}: {message}'):
        make(4, **options)
