"""Experts that compute whole maps, against the mixture of their outputs written out by hand."""

import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import GAPRouter, LinearExperts, MoELayer, add_experts
from mmdet_moe.moe.items import Pixels, Tokens
from mmdet_moe.moe.patches import PatchGrid

C, OUT, E, K = 4, 6, 3, 2


def subnet():
    """Sees all of a map, by group normalisation."""
    return nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1),
        nn.GroupNorm(2, C),
        nn.ReLU(),
        nn.Conv2d(C, OUT, 3, padding=1),
    )


def build(granularity, grid_size=1, **options):
    router = GAPRouter(C, E, K, noise=False, init_std=1.0)
    experts = [subnet() for _ in range(E)]
    return MoELayer(
        experts, E, K, router, granularity=granularity, grid_size=grid_size, whole_maps=True,
        **options,
    ).double()  # fmt: skip


def expected(layer, x, items):
    """Every expert on the whole map, and for every pixel the weights of its item."""
    y = torch.stack([expert(x) for expert in layer.experts])  # (E, N, OUT, H, W)
    weights = layer.routing.dense_weights().unflatten(0, (len(x), -1))
    total = torch.zeros_like(y[0])
    height, width = x.shape[2:]
    for row in range(height):
        for column in range(width):
            place = torch.tensor([[(column + 0.5) / width], [(row + 0.5) / height]])
            item = items.locate(*place)
            for e in range(E):
                total[:, :, row, column] += weights[:, item, e] * y[e, :, :, row, column]
    return total


@pytest.mark.parametrize(('granularity', 'grid_size'), [('pixel', 1), ('patch', 2), ('patch', 9)])
def test_mixture_of_whole_maps(granularity, grid_size):
    layer = build(granularity, grid_size)
    x = torch.randn(2, C, 5, 7, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, expected(layer, x, layer.items[0]))
    assert y.is_contiguous()
    y.square().sum().backward()
    assert all(p.grad.any() for p in layer.router.parameters())


def test_levels():
    layer = build('pixel')
    maps = [torch.randn(2, C, *size, dtype=torch.float64) for size in ((4, 6), (2, 3))]
    outputs = layer(maps)
    assert layer.routing.items_per_level == (48, 12)
    weights = layer.routing.dense_weights()[48:].unflatten(0, (2, 2, 3))
    last = sum(
        weights[..., e, None].permute(0, 3, 1, 2) * layer.experts[e](maps[1]) for e in range(E)
    )
    torch.testing.assert_close(outputs[1], last)


def test_equal_to_the_evaluation_of_items():
    """Where both are possible: experts that see one pixel, and convolutions on patches."""
    x = torch.randn(2, C, 5, 7, dtype=torch.float64)
    for module, options in (
        (nn.Conv2d(C, OUT, 1), {'granularity': 'pixel'}),
        (nn.Conv2d(C, OUT, 3, padding=1), {'granularity': 'patch', 'grid_size': 3}),
    ):
        models = [nn.ModuleDict({'a': module}) for module in (module, module)]
        for model, whole in zip(models, (False, True), strict=True):
            router = {'type': 'mmdet_moe.GAPRouter', 'init_std': 1.0, 'noise': False}
            entry = dict(at='a', num_experts=E, whole_maps=whole, router=router, **options)
            add_experts(model, [{**entry, 'expert_init': 'independent'}])
            model.double()
        models[1].load_state_dict(models[0].state_dict())
        torch.testing.assert_close(*(model['a'](x) for model in models))


@pytest.mark.parametrize(('granularity', 'grid_size'), [('pixel', 1), ('patch', 2)])
def test_half_precision_is_summed_in_float32(granularity, grid_size):
    """Eight equal experts, whose weights sum to 1: what one of them gives, to the last bit."""
    dense = nn.Conv2d(C, OUT, 3, padding=1)
    layer = MoELayer(
        [dense] * 8, 8, 8, GAPRouter(C, 8, 8, init_std=1.0), granularity=granularity,
        grid_size=grid_size, whole_maps=True,
    ).eval()  # fmt: skip
    x = torch.randn(2, C, 6, 6)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, dense(x))


def test_unused_experts_are_in_the_graph_and_are_not_evaluated():
    layer = build('pixel')
    layer.router.fc.weight.data.zero_()
    layer.router.fc.bias.data = torch.tensor([2.0, 0, 3]).double()
    layer.experts[1].forward = None
    layer(torch.randn(2, C, 3, 4, dtype=torch.float64)).sum().backward()
    for parameter in layer.experts[1].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_copies_are_the_dense_module():
    dense = nn.Sequential(subnet())
    model = nn.Sequential(subnet())
    model.load_state_dict(dense.state_dict())
    add_experts(model, {'0': {'granularity': 'pixel', 'whole_maps': True, 'router': None}})
    x = torch.randn(2, C, 5, 7)
    torch.testing.assert_close(model.eval()(x), dense.eval()(x))


def test_sums_and_spreads_of_items():
    counts = torch.arange(2 * 12 * 3.0).view(2, 36)  # 3 numbers for each of 3 × 4 pixels
    pixels, grid = Pixels((2, 3, 4)), PatchGrid((3, 4), grid=2)
    per_pixel = counts.view(2, 3, 4, 3).sum(3)
    assert pixels.total(counts).tolist() == per_pixel.flatten().tolist()
    # The borders of 2 patches in 3 rows: 1 and 2 of them.
    parts = [per_pixel[:, r, c].sum((1, 2)) for r in (slice(0, 1), slice(1, 3)) for c in
             (slice(0, 2), slice(2, 4))]  # fmt: skip
    assert grid.total(counts).tolist() == torch.stack(parts, 1).flatten().tolist()
    assert PatchGrid((3, 4)).total(counts).tolist() == counts.sum(1).tolist()
    for items, number in ((pixels, 12), (grid, 4), (PatchGrid((3, 4)), 1)):
        values = torch.randn(2 * number, E)
        spread = items.spread(values)
        assert spread.shape == (2, E, 3, 4)
        # A sum over the pixels of an item is its number of pixels times its value.
        sizes = items.total(torch.ones(2, 12))
        sums = items.total(spread[:, 1].flatten(1).float())
        torch.testing.assert_close(sums, sizes * values[:, 1])
    with pytest.raises(NotImplementedError, match='Tokens divide no feature map'):
        Tokens((2, 3)).total(counts)


def test_autocast_leaves_numbers_of_positives_and_weights_alone():
    counts = torch.ones(1, 64 * 64)
    counts[0, :3] = 0
    items, weights = PatchGrid((64, 64), grid=2), torch.rand(4, E)
    with torch.autocast('cpu', torch.bfloat16):
        assert items.total(counts).tolist() == [1021, 1024, 1024, 1024]
        assert torch.equal(items.spread(weights)[0, :, 0, 0], weights[0])


class Doubling(nn.Conv2d):
    """Changes its input in place."""

    def forward(self, x):
        return super().forward(x.mul_(2))


def test_experts_that_change_their_input_in_place():
    router = GAPRouter(C, E, K, noise=False)
    experts = [Doubling(C, C, 1) for _ in range(E)]
    layer = MoELayer(
        experts, E, K, router, granularity='pixel', whole_maps=True, shortcut=nn.Identity()
    ).eval()
    x = torch.randn(2, C, 5, 7)
    with torch.no_grad():
        y = layer(x.clone())
        weights = layer.routing.dense_weights().unflatten(0, (2, 5, 7)).permute(3, 0, 1, 2)
        parts = (w[:, None] * e(x.clone()) for w, e in zip(weights, layer.experts, strict=True))
        torch.testing.assert_close(y, x + sum(parts))


def test_experts_on_vectors_are_refused():
    for granularity, grid_size in (('pixel', 1), ('patch', 2)):
        with pytest.raises(ConfigError, match='take maps, which LinearExperts do not'):
            MoELayer(
                LinearExperts(C, C, E), E, K, in_channels=C, granularity=granularity,
                grid_size=grid_size, whole_maps=True,
            )  # fmt: skip


@pytest.mark.parametrize('granularity', ['image', 'token'])
def test_refused_without_items_in_a_map(granularity):
    with pytest.raises(ConfigError, match=f"whole_maps=True has no effect .*='{granularity}'"):
        MoELayer(
            nn.Linear(C, C), E, K, in_channels=C, granularity=granularity, whole_maps=True
        )  # fmt: skip


def test_experts_that_change_the_size_are_refused():
    layer = MoELayer(
        nn.Conv2d(C, C, 3, stride=2, padding=1), E, K, in_channels=C, granularity='pixel',
        whole_maps=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r'keep the size of the map, but .* \(2, 3\) of \(4, 6\)'):
        layer(torch.randn(1, C, 4, 6))
