"""Autocast casts each expert's weights once for all levels of a forward pass."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_moe.moe import ConvExperts, LinearExperts, MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher

C, E, N, SIZES = 4, 6, 3, (9, 8, 7, 6, 5)  # no map is as small as a kernel
PATCHES = {'granularity': 'patch', 'grid_size': 2}
PIXELS = {'granularity': 'pixel'}


class Casts(TorchDispatchMode):
    """Numbers that are cast from float32 to bfloat16, by the last dimensions of their tensors."""

    def __init__(self):
        super().__init__()
        self.numbers = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[packet is torch.ops.aten.copy_]
            is_cast = (source.dtype, result.dtype) == (torch.float32, torch.bfloat16)
            self.numbers[tuple(source.shape[-2:])] += is_cast * source.numel()
        return result


def conv(impl, kernel_size=3):
    return lambda: ConvExperts(C, 5, kernel_size, E, padding='same', impl=impl)


def forward(layer, maps):
    with torch.autocast('cpu', torch.bfloat16), Casts() as casts:
        return layer(maps), casts.numbers


@pytest.mark.parametrize('trains', [True, False])
@pytest.mark.parametrize(
    ('make', 'options', 'last', 'whole'),
    [
        (conv('subbatches'), {}, (3, 3), False),
        (conv('subbatches'), PATCHES, (3, 3), False),
        (conv('subbatches'), {**PATCHES, 'whole_maps': True}, (3, 3), False),
        (conv('subbatches', 1), PIXELS, (1, 1), True),
        (lambda: LinearExperts(C, 5, E), PIXELS, (5, C), True),
    ],
)
def test_once(make, options, last, whole, trains):
    """A stack as a whole in one product of all experts, else the kernels of those with items."""
    layer = MoELayer(make(), E, 2, in_channels=C, **options).train(trains)
    with torch.set_grad_enabled(trains):
        _, numbers = forward(layer, [torch.randn(N, C, size, size) for size in SIZES])
    stacked = next(p for p in layer.experts.parameters() if p.dim() > 2)
    used = E if whole else len(layer.routing.expert_ids.unique())
    assert numbers[last] == used * stacked[0].numel()


def test_few_experts():
    """The kernels of experts without items are left alone."""
    layer = MoELayer(conv('subbatches')(), E, 2, {'noise': False}, in_channels=C)
    layer.router.fc.bias.data[4:] = 100
    _, numbers = forward(layer, [torch.randn(N, C, size, size) for size in SIZES])
    assert numbers[3, 3] == 2 * 5 * C * 9


@pytest.mark.parametrize('impl', ['grouped', 'views'])
def test_mixtures(impl):
    """Kernels are mixed in float32, so what is cast is the mixture of each item."""
    layer = MoELayer(conv(impl)(), E, 2, in_channels=C)
    _, numbers = forward(layer, [torch.randn(N, C, size, size) for size in SIZES])
    assert numbers[3, 3] == N * len(SIZES) * 5 * C * 9


@pytest.mark.parametrize(
    ('make', 'options'), [(conv('subbatches'), {}), (lambda: LinearExperts(C, 5, E), PIXELS)]
)
def test_gradients_are_summed_in_float32(make, options):
    """As if each level had cast the weights by itself; sums in bfloat16 would be 0.4 % off."""
    layer = MoELayer(make(), E, 2, {'noise': False}, in_channels=C, **options)
    maps = [torch.randn(N, C, size, size) for size in SIZES]
    ys, _ = forward(layer, maps)
    sum(y.float().square().sum() for y in ys).backward()
    together = [p.grad.clone() for p in layer.experts.parameters()]
    layer.zero_grad()
    for x, y in zip(maps, ys, strict=True):
        (alone,), _ = forward(layer, [x])
        assert torch.equal(alone, y)
        alone.float().square().sum().backward()
    for parameter, grad in zip(layer.experts.parameters(), together, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, parameter.grad)


def test_a_later_level_needs_another_expert():
    """What the first one has kept for the backward pass stays as it was."""
    experts, x = conv('subbatches')(), torch.randn(2, C, 5, 5)
    results = []
    for shares in (True, False):
        first, second = (
            Dispatcher(torch.tensor(ids), torch.ones(2, 1), E) for ids in ([[0], [1]], [[1], [5]])
        )
        if shares:
            first.shared = second.shared = {}
        with torch.autocast('cpu', torch.bfloat16):
            ys = experts(x, first), experts(x, second)
        loss = sum(y.float().square().sum() for y in ys)
        results.append((*ys, *torch.autograd.grad(loss, experts.parameters())))
    for shared, alone in zip(*results, strict=True):
        assert torch.equal(shared, alone)
