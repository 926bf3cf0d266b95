"""Pixels and tokens against every expert computed on everything, mixed with the weights."""

import itertools

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    ConvGAPRouter,
    EntropyLoss,
    GAPRouter,
    ImportanceLoss,
    KLLoss,
    LinearExperts,
    MLPExperts,
    MoELayer,
    SwitchLoss,
    Utilization,
    VarianceLoss,
)
from mmdet_moe.moe.items import Pixels, Tokens

C, OUT, E, K = 4, 8, 3, 2

EXPERTS = {
    'linear': lambda: LinearExperts(C, OUT, E),
    'mlp': lambda: MLPExperts(C, 12, OUT, E),
    'convs': lambda: [nn.Conv2d(C, OUT, 1) for _ in range(E)],
    'mmcv': lambda: [ConvModule(C, OUT, 1, norm_cfg={'type': 'BN'}) for _ in range(E)],
    'two convs': lambda: [
        nn.Sequential(nn.Conv2d(C, 5, 1), nn.ReLU(), nn.Conv2d(5, OUT, 1)) for _ in range(E)
    ],
    'linears': lambda: [nn.Linear(C, OUT) for _ in range(E)],
}
FOR_PIXELS = ('linear', 'mlp', 'convs', 'mmcv', 'two convs')
FOR_TOKENS = ('linear', 'mlp', 'linears')


def build(experts, granularity, randomise, noise=False, **kwargs):
    router = kwargs.pop('router', None) or GAPRouter(C, E, K, noise=noise)
    layer = MoELayer(EXPERTS[experts](), E, K, router, granularity=granularity, **kwargs)
    return randomise(layer).double()


def dense_outputs(experts, x):
    """(T, E, OUT) of vectors x (T, C)."""
    if isinstance(experts, LinearExperts):
        return torch.einsum('tc,eoc->teo', x, experts.weight) + experts.bias
    if isinstance(experts, MLPExperts):
        first, second = experts.layers
        hidden = (torch.einsum('tc,ehc->teh', x, first.weight) + first.bias).clamp(min=0)
        return torch.einsum('teh,eoh->teo', hidden, second.weight) + second.bias
    if isinstance(experts[0], nn.Linear):
        return torch.stack([expert(x) for expert in experts], dim=1)
    # All vectors as the pixels of one image, which is one column wide.
    column = x.T[None, :, :, None]
    return torch.stack([expert(column)[0, :, :, 0].T for expert in experts], dim=1)


def dense_reference(layer, x):
    """Outputs (T, OUT) of vectors x (T, C)."""
    fc = layer.router.fc
    logits = x @ fc.weight.T + fc.bias
    kept = logits >= logits.topk(K).values[:, -1:]
    weights = logits.masked_fill(~kept, float('-inf')).softmax(1)
    return (weights[:, :, None] * dense_outputs(layer.experts, x)).sum(1)


def as_vectors(granularity, x):
    """(T, C), by loops over the images and places."""
    if granularity == 'token':
        places = itertools.product(*map(range, x.shape[:-1]))
        return torch.stack([x[place] for place in places])
    num, _, height, width = x.shape
    places = itertools.product(range(num), range(height), range(width))
    return torch.stack([x[n, :, h, w] for n, h, w in places])


def check_against_dense(layer, inputs):
    layer.eval()  # the statistics of batch norm are then the same for one expert and for all
    outputs = layer(inputs)
    cotangents = [torch.randn_like(y) for y in outputs]
    parameters = [*inputs, *layer.parameters()]
    gradients = torch.autograd.grad(outputs, parameters, cotangents)
    vectors = [as_vectors(layer.granularity, x) for x in inputs]
    expected = [dense_reference(layer, x) for x in vectors]
    for y, reference in zip(outputs, expected, strict=True):
        actual = as_vectors(layer.granularity, y)
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-10)
    flat = [as_vectors(layer.granularity, g) for g in cotangents]
    dense_gradients = torch.autograd.grad(expected, parameters, flat)
    torch.testing.assert_close(gradients, dense_gradients, rtol=0, atol=1e-9)
    return outputs


def random_inputs(*shapes, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize('experts', FOR_PIXELS)
@pytest.mark.parametrize('sizes', [[(5, 4)], [(6, 5), (3, 2), (1, 1)]], ids=['map', 'levels'])
def test_pixels_are_dense_masked(experts, sizes, randomise):
    layer = build(experts, 'pixel', randomise)
    maps = random_inputs(*[(2, C, *size) for size in sizes])
    outputs = check_against_dense(layer, maps)
    assert [tuple(y.shape) for y in outputs] == [(2, OUT, *size) for size in sizes]
    for x, y in zip(maps, outputs, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)  # one map: one tensor


@pytest.mark.parametrize('experts', FOR_TOKENS)
@pytest.mark.parametrize(
    'shapes',
    [[(2, 7, C)], [(9, C)], [(2, 3, 4, C)], [(2, 7, C), (2, 2, 3, C), (2, C)]],
    ids=['sequences', 'vectors', 'windows', 'several'],
)
def test_tokens_are_dense_masked(experts, shapes, randomise):
    layer = build(experts, 'token', randomise)
    inputs = random_inputs(*shapes)
    outputs = check_against_dense(layer, inputs)
    assert [tuple(y.shape) for y in outputs] == [(*shape[:-1], OUT) for shape in shapes]
    for x, y in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


def test_order_of_pixels(randomise):
    layer = build('linear', 'pixel', randomise)
    layer([torch.randn(2, C, *size).double() for size in ((2, 3), (1, 2))])
    routing = layer.routing
    assert (routing.items_per_level, routing.num_images) == ((12, 4), 2)
    assert routing.level_ids.tolist() == [0] * 12 + [1] * 4
    assert routing.image_ids.tolist() == [0] * 6 + [1] * 6 + [0] * 2 + [1] * 2


def test_order_of_tokens(randomise):
    layer = build('linear', 'token', randomise)
    layer([torch.randn(*shape, C).double() for shape in ((2, 3), (2, 2, 2), (2,))])
    routing = layer.routing
    assert (routing.items_per_level, routing.num_images) == ((6, 8, 2), 2)
    assert routing.image_ids.tolist() == [0] * 3 + [1] * 3 + [0] * 4 + [1] * 4 + [0, 1]
    layer(torch.randn(5, C).double())
    assert (routing.num_images, layer.routing.num_images) == (2, 5)
    assert layer.routing.image_ids.tolist() == [0, 1, 2, 3, 4]


def test_router_sees_true_neighbours(randomise):
    """A router may look around, even where experts do not."""
    router = ConvGAPRouter(C, E, K, conv_channels=6, noise=False)
    layer = build('linear', 'pixel', randomise, router=router)
    x = torch.randn(2, C, 5, 4).double()
    y = layer(x)
    features = nn.functional.conv2d(x, router.conv.weight, router.conv.bias, padding=1).relu()
    logits = as_vectors('pixel', features) @ router.fc.weight.T + router.fc.bias
    torch.testing.assert_close(layer.routing.logits, logits, rtol=0, atol=1e-12)
    outputs = dense_outputs(layer.experts, as_vectors('pixel', x))
    expected = (layer.routing.dense_weights()[:, :, None] * outputs).sum(1)
    torch.testing.assert_close(as_vectors('pixel', y), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('granularity', ['pixel', 'token'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_inputs_are_routed_in_float32(granularity, dtype, randomise):
    layer = build('linear', granularity, randomise, noise=True).float()
    x = torch.randn(2, C, 3, C).to(dtype)
    with torch.autocast('cpu', dtype):
        y = layer(x)
    assert y.dtype == dtype
    logits = as_vectors(granularity, x).float() @ layer.router.fc.weight.T + layer.router.fc.bias
    torch.testing.assert_close(layer.routing.logits, logits, rtol=1e-6, atol=1e-6)
    assert layer.routing.weights.dtype == torch.float32


class TestMemory:
    @pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize('experts', ['linear', 'convs'])
    def test_output_is_laid_out_as_the_input(self, experts, memory_format, randomise):
        layer = build(experts, 'pixel', randomise)
        x = torch.randn(2, C, 5, 6).double().contiguous(memory_format=memory_format)
        assert layer(x).is_contiguous(memory_format=memory_format)

    def test_pixels_of_channels_last_are_not_copied(self):
        x = torch.randn(2, C, 5, 6).contiguous(memory_format=torch.channels_last)
        pixels = Pixels.of(x)
        rows = pixels.crop(x)
        assert rows.data_ptr() == pixels.pool(x).data_ptr() == x.data_ptr()
        assert pixels.place(rows).data_ptr() == x.data_ptr()
        assert torch.equal(pixels.place(rows), x)

    def test_a_map_is_copied_once(self, randomise):
        """For the router, its noise and the experts together."""
        layer = build('linear', 'pixel', randomise, noise=True)
        x = torch.randn(2, C, 30, 40).double()
        with torch.profiler.profile(record_shapes=True) as profile:
            layer(x)
        copies = [
            event
            for event in profile.events()
            if event.name == 'aten::copy_' and event.input_shapes[:1] == [[2, C, 30, 40]]
        ]
        assert len(copies) == 1

    def test_tokens_are_not_copied(self):
        x = torch.randn(2, 3, C)
        tokens = Tokens.of(x)
        rows = tokens.crop(x)
        assert rows.data_ptr() == tokens.pool(x).data_ptr() == tokens.place(rows).data_ptr()
        assert rows.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ('granularity', 'experts', 'shape', 'expected'),
    [
        ('pixel', 'linear', (0, C, 5, 4), (0, OUT, 5, 4)),
        ('pixel', 'convs', (0, C, 5, 4), (0, OUT, 5, 4)),
        ('token', 'linear', (0, C), (0, OUT)),
        ('token', 'mlp', (0, 7, C), (0, 7, OUT)),
        ('token', 'linears', (2, 0, C), (2, 0, OUT)),
    ],
)
def test_no_items(granularity, experts, shape, expected, randomise):
    layer = build(experts, granularity, randomise)
    y = layer(torch.zeros(shape, dtype=torch.float64))
    assert tuple(y.shape) == expected
    assert layer.routing.num_items == len(layer.routing.image_ids) == 0
    (y.sum() + ImportanceLoss(1.0)(layer.routing)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


@pytest.mark.parametrize(('granularity', 'experts'), [('pixel', 'convs'), ('token', 'linears')])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_output_can_be_changed_in_place(granularity, experts, memory_format, randomise):
    """Also where the output is a view and some experts are unused."""
    layer = build(experts, granularity, randomise)
    nn.init.zeros_(layer.router.fc.weight)
    layer.router.fc.bias.data = torch.tensor([2.0, 0, 3]).double()
    x = torch.randn(2, C, 3, C).double().contiguous(memory_format=memory_format)
    expected = dense_reference(layer, as_vectors(granularity, x)).clamp(min=0)
    y = layer(x).relu_()
    torch.testing.assert_close(as_vectors(granularity, y), expected, rtol=0, atol=1e-10)
    y.sum().backward()
    for parameter in layer.experts[1].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


class TestBalancing:
    @pytest.mark.parametrize(('granularity', 'items'), [('pixel', 2 * 12), ('token', 2 * C * 3)])
    def test_losses_and_utilization(self, granularity, items, randomise):
        layer = build('linear', granularity, randomise)
        layer(torch.randn(2, C, 3, 4).double())
        routing = layer.routing
        weights = routing.dense_weights()
        importance = weights.sum(0)
        share = importance / importance.sum()
        expected = {
            ImportanceLoss(1.0): importance.var() / importance.mean() ** 2,
            KLLoss(1.0): (share * (share * E).log()).sum(),
            SwitchLoss(1.0): E
            * ((weights > 0).double().mean(0) / K * routing.logits.softmax(1).mean(0)).sum(),
            VarianceLoss(1.0): -weights.var(0, correction=0).mean(),
        }
        for loss, value in expected.items():
            torch.testing.assert_close(loss(routing), value, rtol=1e-6, atol=1e-8)
        (sum(loss(routing) for loss in expected) + EntropyLoss(1.0)(routing)).backward()
        assert layer.router.fc.weight.grad.any()
        usage = Utilization(E)
        usage.update(routing, layer.router)
        report = usage.report()
        assert report.num_items == items
        assert report.importance == pytest.approx(share.tolist())
        assert report.load == pytest.approx(((weights > 0).sum(0) / (items * K)).tolist())

    def test_constraint(self, randomise):
        constraint = {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.3}
        router = GAPRouter(C, E, K, constraint=constraint)
        layer = build('linear', 'pixel', randomise, router=router)
        layer.train()
        layer(torch.randn(2, C, 3, 4).double())
        importance = layer.routing.importance()
        relative = (importance - importance.mean()) / importance.mean()
        state = layer.router.constraint.relative_importance
        torch.testing.assert_close(state, relative.detach().to(state))

    def test_area_of_pixels(self, randomise):
        layer = build('linear', 'pixel', randomise, decision_weight='area')
        layer([torch.randn(1, C, *size).double() for size in ((2, 3), (1, 2))])
        assert layer.routing.decision_weights.tolist() == [1] * 8

    def test_positives_among_pixels(self, randomise):
        layer = build('linear', 'pixel', randomise, decision_weight='positives')
        layer(torch.randn(1, C, 2, 2).double())
        layer.weigh_decisions(torch.tensor([0, 3, 1, 0]))
        weights = layer.routing.dense_weights()
        expected = 3 * weights[1] + weights[2]
        torch.testing.assert_close(layer.routing.importance(balancing=True), expected)


@pytest.mark.parametrize(
    ('expert', 'options', 'message'),
    [
        (nn.Conv2d(C, C, 3, padding=1), {}, 'a receptive field of radius 1 and stride 1'),
        (nn.Conv2d(C, C, 1, stride=2), {}, 'a receptive field of radius 0 and stride 2'),
        ([nn.Conv2d(C, C, k, padding=k // 2) for k in (1, 1, 3)], {}, 'of radius 1 and stride 1'),
        (nn.GroupNorm(2, C), {}, 'cannot tell the receptive field of GroupNorm; use'),
        (nn.Conv2d(C, C, 1), {'grid_size': 2}, "grid_size=2 has no effect with .*='pixel'"),
    ],
)
def test_refused_for_pixels(expert, options, message):
    with pytest.raises(ConfigError, match=message):
        MoELayer(expert, E, K, in_channels=C, granularity='pixel', **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'grid_size': 2}, "grid_size=2 has no effect with granularity='token'"),
        ({'decision_weight': 'area'}, "decision_weight='area' is about feature maps"),
        ({'decision_weight': 'positives'}, "decision_weight='positives' is about feature maps"),
        (
            {'router': {'type': 'mmdet_moe.ConvGAPRouter'}},
            "router.type=ConvGAPRouter routes feature maps, which granularity='token' has not",
        ),
    ],
)
def test_refused_for_tokens(options, message):
    with pytest.raises(ConfigError, match=message):
        MoELayer(nn.Linear(C, C), E, K, in_channels=C, granularity='token', **options)


class Mean(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.mean(0)


@pytest.mark.parametrize('place', range(E))
def test_one_expert_that_mixes_tokens_is_refused(place):
    experts = [nn.Linear(C, C) for _ in range(E)]
    experts[place] = Mean(C, C)
    with pytest.raises(ConfigError, match='one token at a time, and Mean mixes them'):
        MoELayer(experts, E, K, in_channels=C, granularity='token')


def test_experts_that_grow_their_pixel_are_refused():
    layer = MoELayer(nn.Conv2d(C, C, 1, padding=1), E, K, in_channels=C, granularity='pixel')
    with pytest.raises(ConfigError, match=r'makes? one pixel of one pixel, but .* \(4, 3, 3\)'):
        layer(torch.randn(2, C, 4, 4))


def test_experts_that_fold_their_token_are_refused():
    layer = MoELayer(nn.Unflatten(1, (2, 2)), E, K, in_channels=C, granularity='token')
    with pytest.raises(ConfigError, match=r'a vector of a vector, but .* \(2, 2\)'):
        layer(torch.randn(2, C))


def test_wrong_inputs():
    layer = MoELayer(nn.Linear(C, C), E, K, in_channels=C, granularity='token')
    with pytest.raises(ValueError, match=r'of shape \(..., C\), got \(4,\)'):
        layer(torch.randn(C))
    with pytest.raises(ValueError, match=r'their first dimensions are \[3, 2\]'):
        layer([torch.randn(3, C), torch.randn(2, C)])


def test_places_of_pixels():
    pixels = Pixels.of(torch.zeros(2, C, 3, 4))
    for index, (row, column) in enumerate(itertools.product(range(3), range(4))):
        centre = [(column + 0.5) / 4, (row + 0.5) / 3]
        assert pixels.centres()[index].tolist() == pytest.approx(centre)
        for inside in (0.01, 0.5, 0.99):
            x, y = torch.tensor([(column + inside) / 4]), torch.tensor([(row + inside) / 3])
            assert pixels.locate(x, y).tolist() == [index]
    x, y = pixels.borders()
    assert x.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert y.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    border = torch.tensor([-0.1, 0.0, 1.0, 1.1])
    assert pixels.locate(border, border).tolist() == [0, 0, 11, 11]


def test_tokens_have_no_places():
    tokens = Tokens.of(torch.zeros(2, 3, 4, C))
    assert tokens.locate(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5])).tolist() == [-1, -1]
    assert tokens.centres().shape == (12, 2)
    assert tokens.centres().isnan().all()
    assert tokens.borders() is None
