"""Routers that start with the clusters of their first items."""

import copy

import numpy as np
import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from sklearn.metrics import adjusted_rand_score

from mmdet_moe.errors import ConfigError, NonFiniteRouterError
from mmdet_moe.moe import ConvGAPRouter, GAPRouter, MoELayer, add_experts
from mmdet_moe.moe.kmeans_start import by_clusters

C, E = 6, 3


def items_of_three_kinds(count, seed=0):
    """Maps (count, C, 2, 2), and which kind each is of; the channels have scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(E, (count,), generator=generator)
    centres = torch.tensor([[1.0, 0, 0, 0, 2, 5], [0, 30, 0, 0, 2, 5], [0, 0, 0.01, 0, 2, 5]])
    noise = torch.randn(count, C, 2, 2, generator=generator)
    scales = torch.tensor([0.1, 3, 0.001, 0, 1, 1])
    return centres[kinds][:, :, None, None] + scales[:, None, None] * noise, kinds


def router_of(make=GAPRouter, top_k=1, **kwargs):
    return make(C, E, top_k, noise=False, init='kmeans', **kwargs)


@pytest.mark.parametrize('kwargs', [{}, {'normalise_levels': 1}, {'top_k': 2}])
def test_each_expert_gets_a_cluster(kwargs):
    router = router_of(**kwargs)
    router(items_of_three_kinds(300)[0])
    x, kinds = items_of_three_kinds(200, seed=1)
    chosen = router.eval()(x).expert_ids[:, 0]
    assert adjusted_rand_score(kinds, chosen) == 1


def test_a_convolution_in_front():
    router = router_of(ConvGAPRouter, conv_channels=8)
    router(items_of_three_kinds(300)[0])
    assert router.eval()(items_of_three_kinds(200)[0]).expert_ids.unique().tolist() == [0, 1, 2]


def test_logits_are_distances_to_the_centres():
    x, kinds = items_of_three_kinds(250)
    items = x.mean((2, 3)).double().numpy()
    items[:, 3] = 7  # a channel that never changes
    weight, bias = by_clusters(items, E)
    z = (items - items.mean(0)) / np.where(items.std(0) > 0, items.std(0), 1)
    centres = np.stack([z[kinds == kind].mean(0) for kind in range(E)])
    distances = ((z[:, None] - centres) ** 2).sum(-1)
    logits = items @ weight.T + bias
    # Of which cluster k-means makes which expert is its own affair.
    order = [int(logits[kinds == kind].mean(0).argmax()) for kind in range(E)]
    logits = logits[:, order]
    expected = distances.mean(1, keepdims=True) - distances
    found = logits - logits.mean(1, keepdims=True)
    scale = (found * expected).sum() / (expected**2).sum()
    np.testing.assert_allclose(found, scale * expected, atol=1e-9)
    first, second = np.sort(found, axis=1)[:, :-3:-1].T
    assert (first - second).mean() == pytest.approx(1)


def test_waits_for_enough_items_of_the_training():
    router = router_of()
    x, _ = items_of_three_kinds(400)
    before = router.fc.weight.clone()
    router.eval()(x)
    router.train()
    for batch in x[:180].split(60):
        router(batch)
    assert torch.equal(router.fc.weight, before)
    router(x[180:192])
    after = router.fc.weight.clone()
    assert not torch.equal(after, before)
    router(x[192:])
    assert torch.equal(router.fc.weight, after)


def test_levels_are_normalised_together():
    router = router_of()
    maps = [items_of_three_kinds(200, seed)[0] + shift for seed, shift in ((0, 0), (1, 100))]
    router(maps)
    items = torch.cat([m.mean((2, 3)) for m in maps])
    torch.testing.assert_close(router.norm.mean[0], items.mean(0))
    router.eval()
    z = (items - items.mean(0)) / (items.var(0, unbiased=False) + 1e-5).sqrt()
    expected = z @ router.fc.weight.T + router.fc.bias
    torch.testing.assert_close(router(maps).logits, expected, rtol=1e-3, atol=1e-3)


def test_what_has_been_trained_stays():
    router = router_of()
    router(items_of_three_kinds(300)[0])
    torch.nn.init.normal_(router.fc.weight)
    other = router_of()
    other.load_state_dict(router.state_dict())
    other(items_of_three_kinds(300)[0])
    assert torch.equal(other.fc.weight, router.fc.weight)


def test_the_start_needs_no_gradient_and_leaves_the_weights_their_own():
    router = router_of(softmax='straight_through')
    router(items_of_three_kinds(300)[0]).weights.sum().backward()
    assert router.fc.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'init': 'pca'}, r"init='pca' is unknown; use 'normal' or 'kmeans'"),
        ({'init': 'kmeans', 'bias': False}, r"init='kmeans' sets the bias, which bias=False"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        GAPRouter(C, E, 1, **kwargs)


def test_too_few_different_items():
    with pytest.raises(ConfigError, match=r"init='kmeans': fewer than num_experts=3 of the first"):
        router_of()(torch.ones(300, C, 2, 2))


def test_large_maps_count_as_a_whole():
    """Pixels of a batch come image by image; all images count, not the first ones alone."""
    x = torch.cat([torch.full((1, C, 128, 128), float(kind)) for kind in range(E)])
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    layer = MoELayer(torch.nn.Conv2d(C, 2, 1), E, 1, router_of(), granularity='pixel')
    layer(x)
    layer.eval()(x)
    assert layer.routing.load().tolist() == [128 * 128] * E


def layer_of(**kwargs):
    return MoELayer(torch.nn.Conv2d(C, 2, 1), E, 1, router_of(**kwargs))


def test_a_value_that_is_not_finite_is_told_by_the_layer():
    x = items_of_three_kinds(300)[0]
    x[7] = torch.nan
    with pytest.raises(NonFiniteRouterError):
        layer_of()(x)


def test_calls_of_one_pass_before_the_start_have_their_gradient():
    layer, x = layer_of(softmax='straight_through'), items_of_three_kinds(300)[0]
    before = copy.deepcopy(layer.router.fc)
    x.requires_grad_()
    first = layer.router(x[:100]).logits
    layer.router(x[100:])
    assert layer.router.start.done
    (grad,) = torch.autograd.grad(first.square().sum(), x)
    items = x[:100].mean((2, 3))
    fixed = items.detach()  # the statistics have no gradient
    z = (items - fixed.mean(0)) / (fixed.var(0, unbiased=False) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(before(z).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_all_levels_of_a_head_count():
    """Each level alone has enough patches; the start waits for the others, to the next pass."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(C, 2, 1)

        def forward(self, maps):
            return [self.conv(x) for x in maps]

    head = Head()
    options = dict(type='mmdet_moe.GAPRouter', init='kmeans', softmax='straight_through')
    entry = dict(
        at='conv', num_experts=E, top_k=1, granularity='patch', grid_size=4, router=options
    )
    add_experts(head, [entry])
    noise = torch.randn(E, 20, C, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = [level.requires_grad_() for level in noise + torch.arange(E).view(E, 1, 1, 1, 1) * 50]
    router = head.conv.router
    for _ in range(2):
        assert not router.start.done
        sum(y.sum() for y in head(levels)).backward()
    assert router.start.done
    head.eval()(levels)
    by_level = head.conv.routing.expert_ids.view(E, -1)
    assert sorted(by_level[:, 0].tolist()) == list(range(E))
    assert (by_level == by_level[:, :1]).all()


def test_a_trained_router_of_another_start_stays():
    """Checkpoints with and without the buffer fit both kinds of routers."""
    normal, router = GAPRouter(C, E, 1, noise=False, normalise_levels=1), router_of()
    router.load_state_dict(normal.state_dict())
    router(items_of_three_kinds(300)[0])
    assert torch.equal(router.fc.weight, normal.fc.weight)
    normal.load_state_dict(router.state_dict())
    router_of().load_state_dict(router_of().state_dict())


@pytest.mark.parametrize('done', [True, torch.tensor(True)])
def test_a_trained_router_that_is_loaded_while_items_wait_stays(done):
    """Also from a checkpoint of earlier versions, with a truth value and integers."""
    trained, router = router_of(), router_of()
    trained(items_of_three_kinds(300)[0])
    state = trained.state_dict()
    if done is not True:
        state['start.done'], state['norm.batches'] = done, torch.tensor([1])
    router.begin()
    router(items_of_three_kinds(300, seed=1)[0])
    router.end()
    router.load_state_dict(state)
    for _ in range(2):
        router.begin()
        router(items_of_three_kinds(300, seed=1)[0])
        router.end()
    assert torch.equal(router.fc.weight, trained.fc.weight)
    assert not router.start.waits


def test_averaged_weights_of_a_trained_router_stay():
    """Those of MMEngine's EMA with ``update_buffers``, as YOLOX and RTMDet have it."""
    router = router_of(normalise_levels=1)
    average = ExponentialMovingAverage(router, momentum=0.1, update_buffers=True)
    for seed in range(8):
        router([items_of_three_kinds(60, seed)[0]])
        average.update_parameters(router)
    assert 0 < average.module.start.done < 1
    assert average.module.norm.batches == pytest.approx(
        sum(0.1 * 0.9 ** (8 - n) * n for n in range(2, 9)) + 0.9**7
    )
    loaded = router_of(normalise_levels=1)
    loaded.load_state_dict(average.module.state_dict())
    for seed in range(8):
        loaded([items_of_three_kinds(60, seed)[0]])
    assert torch.equal(loaded.fc.weight, average.module.fc.weight)


def test_a_router_that_was_over_starts_again_with_weights_that_were_not():
    router = router_of()
    router(items_of_three_kinds(300)[0])
    router.load_state_dict(router_of().state_dict())
    before = router.fc.weight.clone()
    router(items_of_three_kinds(300)[0])
    assert router.start.done
    assert not torch.equal(router.fc.weight, before)


def test_the_first_batches_are_normalised_alike():
    """Each is of one kind; by the statistics of its time it would lie around 0, as the others."""
    router = router_of()
    x, kinds = items_of_three_kinds(600)
    batches = [x[kinds == n % E][8 * (n // E) :][:8] for n in range(24)]  # 192 items are enough
    for batch in batches:
        router(batch)
    assert router.start.done
    x, kinds = items_of_three_kinds(200, seed=1)
    for _ in range(2):
        router(x)  # the running statistics of all kinds
    assert adjusted_rand_score(kinds, router.eval()(x).expert_ids[:, 0]) == 1


def test_a_start_that_was_not_over_goes_on_after_loading():
    router = router_of()
    router.load_state_dict(router_of().state_dict())
    router(items_of_three_kinds(300)[0])
    assert router.start.done


def test_compiled():
    router = router_of(softmax='straight_through')
    compiled = torch.compile(router, backend='eager')
    for batch in items_of_three_kinds(300)[0].split(100):
        compiled(batch)
    x, kinds = items_of_three_kinds(200, seed=1)
    assert adjusted_rand_score(kinds, compiled.eval()(x).expert_ids[:, 0]) == 1
