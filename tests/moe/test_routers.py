"""Routers against pooling, convolutions and softmaxes computed another way."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ConvGAPRouter, GAPRouter, RelativeImportanceConstraint, routers
from mmdet_moe.moe.items import Pixels
from mmdet_moe.moe.patches import PatchGrid

E, C = 5, 6


def gap_router(top_k=2, noise=False, **kwargs):
    router = GAPRouter(C, E, top_k, noise=noise, **kwargs).double()
    torch.nn.init.normal_(router.fc.weight)
    torch.nn.init.normal_(router.fc.bias)
    return router


def softmax_by_hand(values):
    exponentials = [math.exp(v) for v in values]
    return [x / sum(exponentials) for x in exponentials]


def gap_logits(router, x):
    """Global average pooling and the linear layer as sums over single numbers' tensors."""
    pooled = x.flatten(2).sum(-1) / x[0, 0].numel()
    return (pooled[:, None, :] * router.fc.weight).sum(-1) + router.fc.bias


def test_gap_logits():
    router, x = gap_router(), torch.randn(3, C, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(router(x).logits, gap_logits(router, x), rtol=0, atol=1e-12)


def test_conv_gap_logits():
    router = ConvGAPRouter(C, E, 2, conv_channels=8, noise=False).double()
    torch.nn.init.normal_(router.fc.weight)
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    # A 3×3 convolution is a matrix product with the 3×3 neighbourhoods.
    columns = F.unfold(x, 3, padding=1)
    features = router.conv.weight.flatten(1) @ columns + router.conv.bias[:, None]
    pooled = features.clamp(min=0).mean(-1)
    expected = pooled @ router.fc.weight.T + router.fc.bias
    torch.testing.assert_close(router(x).logits, expected, rtol=0, atol=1e-12)
    assert ConvGAPRouter(C, E, 2).conv.weight.shape == (256, C, 3, 3)


@pytest.mark.parametrize(
    ('top_k', 'softmax'),
    [
        (2, 'over_chosen'),
        (3, 'over_chosen'),
        (E, 'over_chosen'),
        (1, 'over_all'),
        (2, 'over_all'),
        (E, 'over_all'),
        (1, 'straight_through'),
        (2, 'straight_through'),
    ],
)
def test_weights(top_k, softmax):
    router = gap_router(top_k, softmax=softmax)
    routing = router(torch.randn(4, C, 3, 3, dtype=torch.float64))
    for logits, ids, weights in zip(
        routing.logits.tolist(), routing.expert_ids.tolist(), routing.weights.tolist(), strict=True
    ):
        best = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        assert ids == best
        if softmax != 'over_all':
            expected = softmax_by_hand([logits[e] for e in best])
            assert sum(weights) == pytest.approx(1, abs=1e-12)
        else:
            expected = [softmax_by_hand(logits)[e] for e in best]
        assert weights == pytest.approx(expected, abs=1e-12)


def test_defaults_of_softmax():
    assert GAPRouter(C, E, 1).softmax == 'over_all'
    assert GAPRouter(C, E, 2).softmax == 'over_chosen'


@pytest.mark.parametrize('top_k', [1, 2])
def test_straight_through_has_the_gradient_over_all(top_k):
    x, grad = torch.randn(4, C, 3, 3, dtype=torch.float64), torch.randn(4, top_k).double()
    found = {}
    for softmax in ('straight_through', 'over_all'):
        torch.manual_seed(1)
        router = gap_router(top_k, softmax=softmax)
        router(x).weights.backward(grad)
        found[softmax] = router.fc.weight.grad
    assert found['over_all'].abs().max() > 1e-3
    torch.testing.assert_close(found['straight_through'], found['over_all'])


@pytest.mark.parametrize('top_k', [1, 2])
def test_the_task_reaches_the_router(top_k):
    router = gap_router(top_k)
    router(torch.randn(4, C, 3, 3, dtype=torch.float64)).weights[:, 0].sum().backward()
    assert router.fc.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize('make', [GAPRouter, ConvGAPRouter])
@pytest.mark.parametrize(
    ('top_k', 'softmax'), [(1, 'over_all'), (2, 'over_chosen'), (2, 'over_all')]
)
def test_gradients_by_finite_differences(make, top_k, softmax):
    kwargs = {'conv_channels': 4} if make is ConvGAPRouter else {}
    router = make(2, 3, top_k, softmax=softmax, noise=False, **kwargs).double()
    torch.nn.init.normal_(router.fc.weight)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in router.named_parameters()]

    def weights(x, *parameters):
        routing = torch.func.functional_call(
            router, dict(zip(names, parameters, strict=True)), (x,)
        )
        return routing.weights, routing.logits

    assert gradcheck(weights, (x, *router.parameters()))


def test_one_routing_for_all_levels():
    router = gap_router()
    maps = [torch.randn(2, C, size, size + 1, dtype=torch.float64) for size in (8, 4, 2)]
    routing = router(maps)
    assert routing.items_per_level == (2, 2, 2)
    assert routing.level_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.image_ids.tolist() == [0, 1] * 3
    assert routing.decision_weights.tolist() == [1.0] * 6
    for i, level in enumerate(maps):
        alone = gap_logits(router, level)
        torch.testing.assert_close(routing.logits[2 * i : 2 * i + 2], alone, rtol=0, atol=1e-12)


def test_order_of_patches():
    """Level, then image, then patch, row by row."""
    router = gap_router()
    maps = [
        torch.randn(2, C, 6, 9, dtype=torch.float64),
        torch.randn(2, C, 4, 2, dtype=torch.float64),
    ]
    grids = [PatchGrid((6, 9), grid=3), PatchGrid((4, 2))]
    routing = router(maps, grids)
    assert routing.items_per_level == (18, 2)
    assert routing.image_ids.tolist() == [0] * 9 + [1] * 9 + [0, 1]
    item = 0
    for image in range(2):
        for row in range(3):
            for column in range(3):
                patch = maps[0][image, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                expected = gap_logits(router, patch[None])[0]
                torch.testing.assert_close(routing.logits[item], expected, rtol=0, atol=1e-12)
                item += 1
    expected = gap_logits(router, maps[1])
    torch.testing.assert_close(routing.logits[item:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('make', [GAPRouter, ConvGAPRouter])
@pytest.mark.parametrize('patches', [None, [PatchGrid((5, 6), grid=2)]])
def test_float32_under_autocast(make, patches):
    router, x = make(C, E, 2).eval(), torch.randn(2, C, 5, 6)
    plain = router(x, patches)
    with torch.autocast('cpu', torch.bfloat16):
        under_autocast = router(x, patches)
        assert F.linear(x, router.fc.weight.new_ones(3, 6)).dtype == torch.bfloat16
    assert torch.equal(under_autocast.logits, plain.logits)
    assert torch.equal(under_autocast.weights, plain.weights)
    half = router(x.bfloat16(), patches)  # features that an autocast convolution made
    assert half.logits.dtype == half.weights.dtype == torch.float32
    assert torch.equal(half.logits, router(x.bfloat16().float(), patches).logits)


def test_distribution_of_the_training_noise():
    """Without a constraint: ``logits + eps · softplus(W_noise · GAP(x) + 0.01)``."""
    router = gap_router(top_k=E, softmax='over_all', noise=None)
    torch.nn.init.normal_(router.noise_fc.weight)
    x = torch.randn(1, C, 3, 3, dtype=torch.float64)
    noise_inputs = (router.noise_fc.weight * x.mean((0, 2, 3))).sum(-1) + 0.01
    std = torch.log1p(noise_inputs.exp()).detach()
    clean = gap_logits(router, x)[0].detach()
    routing = router(x.expand(20_000, -1, -1, -1))
    torch.testing.assert_close(routing.logits[7], clean, rtol=0, atol=1e-12)  # kept without noise
    # With k = E and softmax over all, log weights are the noisy logits up to a constant per item.
    noisy = torch.empty_like(routing.weights).scatter(1, routing.expert_ids, routing.weights).log()
    difference = (noisy[:, 1:] - noisy[:, :1] - (clean[1:] - clean[0])).detach()
    expected = (std[1:] ** 2 + std[0] ** 2).sqrt()
    # The standard error of a std from n values is std / sqrt(2 n), of a mean std / sqrt(n): 5 of
    # them are 2.5 % and 3.5 % of the std here.
    torch.testing.assert_close(difference.std(0), expected, rtol=0.025, atol=0)
    assert (difference.mean(0).abs() < 0.036 * expected).all()
    assert abs(((difference / expected).abs() < 1).double().mean() - 0.6827) < 0.01  # normal


def test_noise_starts_equal_for_all_experts():
    assert torch.equal(GAPRouter(C, E, 2).noise_fc.weight, torch.zeros(E, C))


def test_no_noise_in_evaluation():
    router, x = gap_router(noise=True), torch.randn(2, C, 3, 3, dtype=torch.float64)
    assert not torch.equal(router(x).weights, router(x).weights)
    router.eval()
    expected = gap_logits(router, x).topk(2).values.softmax(-1)
    torch.testing.assert_close(router(x).weights, expected, rtol=0, atol=1e-12)


def test_uniform_noise_in_training_only():
    router, x = gap_router(2, noise='uniform'), torch.randn(500, C, 3, 3, dtype=torch.float64)
    assert router.noise_fc is None
    plain = router.eval()(x)
    assert torch.equal(router(x).weights, plain.weights)
    torch.manual_seed(7)
    routing = router.train()(x)
    torch.manual_seed(7)
    noise = torch.rand(500, E, dtype=torch.float64)
    assert torch.equal(routing.logits, plain.logits)
    values, ids = (plain.logits + noise).topk(2)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(routing.weights, values.softmax(-1))


def test_gates_of_a_subclass():
    """They multiply the experts' outputs; the weights stay what they are."""

    class Negative(GAPRouter):
        def gates(self, logits, expert_ids, weights):
            return -logits.gather(1, expert_ids)

    router = Negative(C, E, 2, noise='uniform').double()
    x = torch.randn(50, C, 3, 3, dtype=torch.float64)
    torch.manual_seed(7)
    routing = router(x)
    torch.manual_seed(7)
    values, ids = (gap_logits(router, x) + torch.rand(50, E, dtype=torch.float64)).topk(2)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(routing.gates, -values)
    torch.testing.assert_close(routing.weights, values.softmax(-1))


@pytest.mark.parametrize(('former', 'now'), [('kept', 'over_chosen'), ('all', 'over_all')])
def test_former_names(former, now, monkeypatch):
    said = []
    monkeypatch.setattr(routers, 'print_log', lambda text, **_: said.append(text))
    routers._warn_once.cache_clear()
    assert [GAPRouter(C, E, 2, softmax=former).softmax for _ in range(2)] == [now, now]
    assert said == [f"softmax='{former}' is now called softmax='{now}'"]


@pytest.mark.parametrize('make', [GAPRouter, ConvGAPRouter])
def test_options_of_the_linear_layer(make):
    router = make(C, E, 2, bias=False, init_std=0.0)
    assert router.fc.bias is None
    assert not router.fc.weight.any()
    wide = make(200, E, 2, init_std=0.5).fc if make is GAPRouter else None
    assert wide is None or wide.weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_no_noise_with_a_constraint():
    router = GAPRouter(C, E, 2, constraint={'type': 'mmdet_moe.RelativeImportanceConstraint'})
    assert router.noise_fc is None
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(router(x).weights, router(x).weights)


def test_constraint_from_config_and_instance():
    config = {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.3}
    router = GAPRouter(C, E, 2, constraint=config)
    assert router.constraint.threshold == 0.3
    assert router.constraint.relative_importance.shape == (E,)
    constraint = RelativeImportanceConstraint(E)
    assert GAPRouter(C, E, 2, constraint=constraint).constraint is constraint


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_experts': 0, 'top_k': 1}, r'num_experts=0\b.*at least 1 expert'),
        ({'top_k': 6}, r'top_k=6 must lie between 1 and num_experts=5'),
        ({'top_k': 0}, r'top_k=0 must lie between 1 and num_experts=5'),
        ({'softmax': 'some'}, r"softmax='some' is unknown; use one of .*'over_all'"),
        ({'noise': 'normal'}, r"noise='normal' is unknown; use True, False or 'uniform'"),
        ({'noise': 1}, r"noise=1 is unknown; use True, False or 'uniform'"),
        ({'init_std': -1.0}, r'init_std=-1.0 must be a finite number of at least 0'),
        (
            {'noise': 'uniform', 'constraint': {'type': 'mmdet_moe.MeanImportanceConstraint'}},
            r"noise='uniform' cannot be combined with constraint=MeanImportanceConstraint",
        ),
        (
            {'top_k': 1, 'softmax': 'over_chosen'},
            r"softmax='over_chosen' with top_k=1 .*use softmax='straight_through'",
        ),
        (
            {'noise': True, 'constraint': {'type': 'mmdet_moe.MeanImportanceConstraint'}},
            r'noise=True cannot be combined with constraint=MeanImportanceConstraint',
        ),
    ],
)
@pytest.mark.parametrize('make', [GAPRouter, ConvGAPRouter])
def test_refused(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**{'in_channels': C, 'num_experts': E, 'top_k': 2, **options})


def test_kept_softmax_is_harmless_with_one_expert():
    assert GAPRouter(C, 1, 1, softmax='over_chosen')(torch.randn(2, C, 1, 1)).weights.tolist() == [
        [1],
        [1],
    ]


class TestNormalisedLevels:
    """Of :class:`GAPRouter`; every level by itself."""

    @staticmethod
    def router(kind=GAPRouter, **options):
        torch.manual_seed(0)
        return kind(4, 3, 2, noise=False, normalise_levels=2, init_std=1.0, **options).double()

    @staticmethod
    def maps(images=5):
        return [torch.randn(images, 4, 3, 3).double() * s + m for s, m in ((2, 10), (0.1, -7))]

    @staticmethod
    def mixed(old, new, share):
        """Mean and variance of items of which this share is new, the others old."""
        mean = (1 - share) * old[0] + share * new[0]
        square = (1 - share) * (old[1] + old[0] ** 2) + share * (new[1] + new[0] ** 2)
        return mean, square - mean**2

    def test_running_statistics_by_hand(self):
        """The first ten batches count alike, and at once; later ones a tenth, and afterwards."""
        router = self.router()
        batches = [self.maps() for _ in range(14)]
        logits = [router(batch).logits for batch in batches]
        for level in range(2):
            seen = [batch[level].mean((2, 3)) for batch in batches]
            known = None
            for number, (features, of_batch) in enumerate(zip(seen, logits, strict=True)):
                if number < 10:
                    together = torch.cat(seen[: number + 1])
                    known = together.mean(0), together.var(0, correction=0)
                mean, variance = known
                expected = router.fc((features - mean) / (variance + 1e-5).sqrt())
                found = of_batch[5 * level :][:5]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                if number >= 10:
                    of_this = features.mean(0), features.var(0, correction=0)
                    known = self.mixed(known, of_this, 0.1)
            found = router.norm.mean[level], router.norm.variance[level]
            torch.testing.assert_close(found, known, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize('num_items', [1, 2, 8])
    def test_variance_is_that_of_all_items(self, num_items):
        """Also where a batch has hardly any of its own."""
        torch.manual_seed(0)
        norm = routers.LevelNorm(1, 300)
        for _ in range(200):
            norm(5 + 3 * torch.randn(num_items, 300), 0)
        items = norm.eval()(5 + 3 * torch.randn(1000, 300), 0)
        # Somewhat larger: the running statistics have an error of their own.
        assert 0.95 < items.var(0).mean() < 1.25
        assert items.mean().abs() < 0.05

    def test_a_first_item_tells_no_variance(self):
        norm = routers.LevelNorm(1, 2)
        x = torch.tensor([[1.0, 70.0], [4.0, 70.0]])
        assert norm(x[:1], 0).tolist() == [[0, 0]]
        assert norm.variance.tolist() == [[1, 1]]
        norm(x[1:], 0)
        assert norm.mean.tolist() == [[2.5, 70]]
        # Of 1 + 1.5² and 0 + 1.5², half and half; where both are equal, of 1 and 0.
        assert norm.variance.tolist() == [[2.75, 0.5]]

    def test_calls_of_a_pass_are_one_batch(self):
        """They go by what was known before, as inference does, and count together in the end."""
        norm = routers.LevelNorm(1, 4)
        for _ in range(10):
            norm(torch.randn(6, 4), 0)
        before = norm.mean[0].double(), norm.variance[0].double()
        parts = [torch.randn(n, 4).double() + shift for n, shift in ((3, 0), (7, 50), (1, -9))]
        norm.begin()
        found = torch.cat([norm(part, 0) for part in parts])
        assert norm.batches.tolist() == [10]
        items = torch.cat(parts)
        torch.testing.assert_close(found, (items - before[0]) / (before[1] + 1e-5).sqrt())
        norm.end()
        after = self.mixed(before, (items.mean(0), items.var(0, correction=0)), 0.1)
        for of_norm, expected in zip((norm.mean, norm.variance), after, strict=True):
            torch.testing.assert_close(of_norm[0].double(), expected, rtol=1e-5, atol=1e-5)
        assert norm.batches.tolist() == [11]

    def test_a_pass_that_an_error_ended(self):
        norm = routers.LevelNorm(1, 4)
        norm.begin()
        norm(torch.randn(6, 4), 0)
        norm.begin()
        assert norm.batches.tolist() == [1]
        norm.end()
        assert norm.batches.tolist() == [1]

    def test_a_small_spread_around_a_large_mean(self):
        """In float32, where the difference of two squares would be off by a tenth."""
        norm = routers.LevelNorm(1, 4)
        for _ in range(60):
            norm(30 + 0.01 * torch.randn(2000, 4), 0)
        torch.testing.assert_close(norm.variance, torch.full((1, 4), 1e-4), rtol=0.05, atol=0)

    def test_levels_cannot_be_told_apart_by_their_means(self):
        router = self.router()
        maps = self.maps(200)
        shifted = [maps[0], maps[1] + 50]
        means = router(maps).logits.unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-6)
        other = self.router()(shifted).logits
        torch.testing.assert_close(other, router(maps).logits, rtol=1e-4, atol=1e-4)

    def test_same_at_inference_and_unchanged_by_it(self):
        router = self.router()
        maps = self.maps()
        trained = router(maps).logits
        router.eval()
        torch.testing.assert_close(router(maps).logits, trained)
        # A decision does not depend on the other images.
        alone = router([level[:1] for level in maps]).logits
        torch.testing.assert_close(alone, trained[[0, 5]])
        assert router.norm.batches.tolist() == [1, 1]

    def test_batches_without_items_change_nothing(self):
        router = self.router()
        for images, batches in ((0, [0, 0]), (5, [1, 1]), (0, [1, 1])):
            before = copy.deepcopy(router.norm.state_dict())
            router(self.maps(images))
            after = router.norm.state_dict()
            assert after['batches'].tolist() == batches
            if not images:
                assert all(torch.equal(before[key], after[key]) for key in after)

    def test_pixels_and_a_convolution_before(self):
        maps = self.maps()
        items = [Pixels.of(level) for level in maps]
        assert self.router()(maps, items).logits.shape == (90, 3)
        assert self.router(ConvGAPRouter, conv_channels=6)(maps).logits.shape == (10, 3)

    def test_wrong_numbers(self):
        with pytest.raises(
            ConfigError, match=r'normalise_levels=2, but the router is given 1 feat.*remove'
        ):
            self.router()(self.maps()[:1])
        with pytest.raises(ConfigError, match='normalise_levels=0 must be the number'):
            GAPRouter(4, 3, 2, normalise_levels=0)
