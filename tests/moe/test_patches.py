"""Patches against the experts run on whole feature maps and masked to each patch."""

import itertools

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ModuleExperts, MoELayer
from mmdet_moe.moe.patches import PatchGrid
from mmdet_moe.moe.receptive_field import receptive_field

C = 3


def bn_conv(channels, kernel_size, **kwargs):
    conv = nn.Conv2d(C, channels, kernel_size, padding=(kernel_size - 1) // 2, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def resnet_stage(block, stride):
    resnet = ResNet(18 if block is BasicBlock else 50)
    return resnet.make_res_layer(block=block, inplanes=C, planes=2, num_blocks=2, stride=stride)


EXPERTS = {  # name: expert, stride, radius of the receptive field
    'pointwise': (lambda: nn.Conv2d(C, 2, 1), 1, 0),
    'conv': (lambda: bn_conv(2, 3), 1, 1),
    'large conv': (lambda: nn.Conv2d(C, 2, 7, padding=3), 1, 3),
    'dilated conv': (lambda: nn.Conv2d(C, 2, 3, padding=3, dilation=3), 1, 3),
    'mixed conv': (lambda: nn.Conv2d(C, 2, (1, 5), padding=(0, 2)), 1, 2),
    'two convs': (lambda: nn.Sequential(*bn_conv(C, 3), *bn_conv(2, 5)), 1, 3),
    'mmcv': (lambda: ConvModule(C, 2, 3, padding=1, norm_cfg={'type': 'BN'}), 1, 1),
    'strided': (lambda: nn.Sequential(*bn_conv(C, 3, stride=2), *bn_conv(2, 3)), 2, 3),
    'stride 4': (lambda: nn.Sequential(*bn_conv(C, 3, stride=2), *bn_conv(2, 3, stride=2)), 4, 3),
    'max pool': (
        lambda: nn.Sequential(*bn_conv(C, 3), nn.MaxPool2d(3, stride=2, padding=1)),
        2,
        2,
    ),
    'basic blocks': (lambda: resnet_stage(BasicBlock, 2), 2, 1 + 2 + 2 + 2),
    'bottlenecks': (lambda: resnet_stage(Bottleneck, 2), 2, 1 + 2),
    'unstrided blocks': (lambda: resnet_stage(BasicBlock, 1), 1, 4),
}
every_expert = pytest.mark.parametrize(('make', 'stride', 'radius'), EXPERTS.values(), ids=EXPERTS)


def bounds(length, grid, stride):
    """First and last output pixel of every patch: i · length // grid, fewer for small maps."""
    out = (length + stride - 1) // stride
    grid = min(grid, out)
    edges = [i * out // grid for i in range(grid + 1)]
    return list(itertools.pairwise(edges))


def patch_layer(make, randomise, grid, num_experts=3):
    experts = [randomise(make()) for _ in range(num_experts)]
    layer = MoELayer(
        experts,
        num_experts,
        top_k=2,
        router={'in_channels': C, 'noise': False},
        granularity='patch',
        grid_size=grid,
    )
    randomise(layer.router)
    return layer.double().eval()


def whole_map_reference(layer, x, grid, stride):
    """Every expert on the whole map; patch by patch its pixels times the patch's weight."""
    whole = [expert(x) for expert in layer.experts]
    total = torch.zeros_like(whole[0])
    for top, bottom in bounds(x.shape[2], grid, stride):
        for left, right in bounds(x.shape[3], grid, stride):
            patch = x[:, :, top * stride : bottom * stride, left * stride : right * stride]
            logits = layer.router.fc(patch.mean((2, 3)))
            kept = logits >= logits.topk(2).values[:, 1:]
            weights = logits.masked_fill(~kept, float('-inf')).softmax(1)
            area = torch.zeros_like(total[:1, :1])
            area[..., top:bottom, left:right] = 1
            for e, y in enumerate(whole):
                total = total + area * weights[:, e, None, None, None] * y
    return total


@every_expert
def test_patches_are_cut_outs_of_the_whole_map(make, stride, radius, randomise):
    for size, grid in [((25, 31), 2), ((25, 31), 3), ((31, 25), 4), ((9, 3), 4)]:
        layer = patch_layer(make, randomise, grid)
        x = torch.randn(2, C, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = whole_map_reference(layer, x, grid, stride)
            y = layer(x)
        patches = len(bounds(size[0], grid, stride)) * len(bounds(size[1], grid, stride))
        assert layer.routing.num_items == 2 * patches
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', ['conv', 'basic blocks'])
def test_gradients(name, randomise):
    make, stride, _ = EXPERTS[name]
    layer = patch_layer(make, randomise, 3)
    x = torch.randn(2, C, 25, 31, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    sparse = torch.autograd.grad(y, inputs, cotangent)
    dense = torch.autograd.grad(whole_map_reference(layer, x, 3, stride), inputs, cotangent)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_every_size(randomise):
    """All remainders of size, grid and stride."""
    layers = {
        stride: {g: patch_layer(EXPERTS[name][0], randomise, g) for g in (2, 3)}
        for name, stride in [('conv', 1), ('strided', 2), ('stride 4', 4)]
    }
    for stride, by_grid in layers.items():
        for grid, layer in by_grid.items():
            for height in range(1, 21):
                x = torch.randn(1, C, height, 23 - height, dtype=torch.float64)
                with torch.no_grad():
                    expected = whole_map_reference(layer, x, grid, stride)
                    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('stride', [1, 2])
def test_pooling(stride):
    grid, x = PatchGrid((7, 10), 3, stride, 5), torch.randn(2, C, 7, 10)
    expected = [
        image[:, top * stride : bottom * stride, left * stride : right * stride].mean((1, 2))
        for image in x
        for top, bottom in bounds(7, 3, stride)
        for left, right in bounds(10, 3, stride)
    ]
    assert len(grid) == 9
    torch.testing.assert_close(grid.pool(x), torch.stack(expected))
    assert grid.pool(x.bfloat16()).dtype == torch.float32


def test_crops_are_smaller_than_the_map():
    """A patch does not cost as much as the whole map."""
    assert PatchGrid((64, 64), 4, 1, 3).crop(torch.zeros(1, 1, 64, 64)).shape == (16, 1, 22, 22)


def test_small_maps_get_fewer_patches():
    assert len(PatchGrid((2, 9), 4)) == 2 * 4
    assert len(PatchGrid((1, 1), 4)) == 1
    assert len(PatchGrid((6, 8), 4, stride=2)) == 3 * 4


@pytest.mark.parametrize('num_images', [0, 1])
def test_levels_of_patches(num_images, randomise):
    layer = patch_layer(EXPERTS['conv'][0], randomise, 3)
    maps = [torch.randn(num_images, C, s, s + 1, dtype=torch.float64) for s in (9, 4, 1)]
    outputs = layer(maps)
    assert layer.routing.items_per_level == (9 * num_images, 9 * num_images, 2 * num_images)
    for y, level in zip(outputs, maps, strict=True):
        expected = whole_map_reference(layer, level, 3, 1)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@every_expert
def test_receptive_field(make, stride, radius, randomise):
    """Which input pixels move an output pixel, measured with gradients."""
    module = randomise(make()).double().eval()
    assert receptive_field(module, C)[1] == stride
    claimed = receptive_field(module, C)[0]
    x = torch.randn(1, C, 48, 48, dtype=torch.float64, requires_grad=True)
    reach = 0
    for position in range(3, 9):  # a ReLU may hide some of them
        y = module(x)[0, :, position, position].sum()
        (gradient,) = torch.autograd.grad(y, x)
        for pixel in gradient[0].abs().sum(0).nonzero():
            reach = max(reach, (pixel - position * stride).abs().max().item())
    assert reach <= claimed
    assert radius <= claimed <= radius + 1  # pooling may be overestimated by a pixel


@pytest.mark.parametrize('kernels', [(1, 5, 1), (5, 1, 3), (1, 1, 3)])
def test_experts_that_see_unequally_far(kernels, randomise):
    sizes = iter(kernels)
    layer = patch_layer(lambda: bn_conv(2, next(sizes)), randomise, 4)
    assert layer.halo == max(kernels) // 2
    x = torch.randn(2, C, 16, 13, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole_map_reference(layer, x, 4, 1))


def test_unequal_strides_are_refused():
    experts = [nn.Conv2d(C, 2, 3, stride, 1) for stride in (1, 1, 2)]
    with pytest.raises(ConfigError, match=r'the strides \[1, 2\], .*; use experts of one stride'):
        MoELayer(experts, 3, 2, in_channels=C, granularity='patch', grid_size=2)


def test_equal_experts_are_looked_at_once(randomise):
    """Whatever their weights and statistics are; what else differs is another look."""
    alike = [randomise(bn_conv(C, 3)) for _ in range(3)]
    others = [bn_conv(C, 5), bn_conv(C, 3, dilation=2), nn.Conv2d(C, C, 3, padding=1)]
    masked = [nn.Identity(), nn.Identity()]
    for at, module in enumerate(masked):
        module.register_buffer('mask', torch.eye(3)[at])
    experts = ModuleExperts([*alike, *others, *masked])
    assert experts.unlike() == [experts[0], *experts[3:]]


def test_experts_of_an_unknown_receptive_field_are_refused():
    experts = [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)]
    with pytest.raises(ConfigError, match='granularity="image"'):
        MoELayer(experts, 2, 1, in_channels=C, granularity='patch', grid_size=2)


def test_experts_that_shrink_their_input_are_refused():
    layer = MoELayer(nn.Conv2d(C, 2, 3), 2, 1, in_channels=C, granularity='patch', grid_size=2)
    with pytest.raises(ConfigError, match='needs experts that keep the size'):
        layer(torch.randn(1, C, 8, 8))


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('grid', [1, 2, 3, 4])
def test_places_of_patches(grid, stride):
    """Every output pixel lies in its patch; the middle of a patch is between its bounds."""
    for size in ((7, 10), (16, 16), (3, 1), (1, 1), (9, 4)):
        patches = PatchGrid(size, grid, stride, 3)
        rows, columns = (bounds(length, grid, stride) for length in size)
        height, width = rows[-1][1], columns[-1][1]
        cells = [(row, column) for row in rows for column in columns]
        assert len(cells) == len(patches)
        for index, ((top, bottom), (left, right)) in enumerate(cells):
            centre = patches.centres()[index]
            expected = [(left + right) / 2 / width, (top + bottom) / 2 / height]
            assert centre.tolist() == pytest.approx(expected)
            for row in range(top, bottom):
                for column in range(left, right):
                    for inside in (0.001, 0.5, 0.999):
                        x = torch.tensor([(column + inside) / width]).double()
                        y = torch.tensor([(row + inside) / height]).double()
                        assert patches.locate(x, y).tolist() == [index]
        x, y = patches.borders()
        assert x.tolist() == pytest.approx([0, *(right / width for _, right in columns)])
        assert y.tolist() == pytest.approx([0, *(bottom / height for _, bottom in rows)])
        corners = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
        last = len(patches) - 1
        assert patches.locate(*corners).tolist() == [0, len(columns) - 1, last]
        located = patches.locate(*patches.centres().T)
        assert located.tolist() == list(range(len(patches)))
        assert located.dtype == torch.int64


def test_places_beyond_the_map():
    """A box that reaches out belongs to the patches at the border."""
    outside = torch.tensor([-0.2, 1.3])
    assert PatchGrid((8, 8), 2).locate(outside, outside).tolist() == [0, 3]
