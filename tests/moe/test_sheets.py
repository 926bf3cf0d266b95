"""Items of several levels on one sheet per expert: the same numbers as level by level."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmdet_moe.models  # noqa: F401  (registers the head)
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.experts import sheets
from mmdet_moe.moe.flops import count_flops

SIZES = ((9, 12), (5, 6), (3, 3), (2, 1))


def subnet(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*(layers or (
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=4, dilation=2),
        nn.SiLU(), nn.Conv2d(8, 3, 1),
    )))  # fmt: skip


def layer_of(expert: nn.Module, **options) -> MoELayer:
    torch.manual_seed(0)
    settings_ = {'num_experts': 4, 'top_k': 2, 'in_channels': 4, **options}
    layer = MoELayer(expert, **settings_).double()
    layer.router.eval()  # no noise
    return layer


def maps_of(sizes=SIZES, images: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        # Every level of its own brightness, so that the router tells them apart.
        i + torch.randn(images, 4, *size, dtype=torch.double, generator=generator)
        for i, size in enumerate(sizes)
    ]


def computed(layer: MoELayer, impl: str, maps, layout=torch.contiguous_format):
    layer.experts.impl = impl
    layer.zero_grad()
    inputs = [x.clone(memory_format=layout).requires_grad_() for x in maps]
    outputs = layer(inputs)
    sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs)).backward()
    return outputs, [x.grad for x in inputs], [p.grad for p in layer.parameters()]


def assert_same(layer, maps, layout=torch.contiguous_format):
    """Outputs and gradients; the sheets of all experts, if they were used at all."""
    expected = computed(layer, 'levels', maps, layout)
    used = []
    through = sheets.Sheets.through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheets.Sheets, 'through', lambda s, e: used.append(s) or through(s, e))
        found = computed(layer, 'sheets', maps, layout)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    return [s for s in used if len(s.heights) > 1]  # the others are those of the trials


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('options', [
    {}, {'top_k': 1}, {'top_k': 4}, {'granularity': 'patch', 'grid_size': 2},
    {'capacity_factor': 0.5}, {'num_experts': 16},
])  # fmt: skip
def test_as_level_by_level(options, layout):
    layer = layer_of(subnet(), **options)
    assert assert_same(layer, maps_of(), layout)


def test_experts_without_items_and_a_wide_margin():
    layer = layer_of(
        subnet(nn.Conv2d(4, 4, 7, padding=3), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    )
    with torch.no_grad():
        layer.router.fc.weight.zero_()
        layer.router.fc.bias.copy_(torch.tensor([0.0, 2.0, 0.0, 1.0]))
    (used,) = assert_same(layer, maps_of())
    assert [height > 0 for height in used.heights] == [False, True, False, True]


class Residual(nn.Module):
    """An expert of a class of its own, whose convolution does not see its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.conv(x).exp())


def test_an_expert_of_any_class():
    assert assert_same(layer_of(Residual()), maps_of())


class Checkpointed(Residual):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class FirstOfATuple(Residual):
    def forward(self, x):
        return (super().forward(x),)


class DropPath(nn.Module):
    """Leaves one of a thousand items out."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 1e-3)


@pytest.mark.parametrize('expert', [
    subnet(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, stride=1, padding=1)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)),
    subnet(nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.Conv2d(4, 4, 3, padding=1)),
    subnet(nn.Conv2d(4, 4, 3)),
    subnet(nn.Conv2d(4, 4, 3, padding=1, stride=2)),
    subnet(nn.ConvTranspose2d(4, 4, 3, padding=1)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.5)),
    subnet(nn.Conv2d(4, 4, 3, padding=1), DropPath()),
    Checkpointed(),
    FirstOfATuple(),
], ids=str)  # fmt: skip
def test_what_cannot_lie_on_sheets(expert):
    assert sheets.margin_of(expert, 4) is None


@pytest.mark.parametrize(('expert', 'margin'), [
    (subnet(), 4), (subnet(nn.Conv2d(4, 4, 1)), 0), (subnet(nn.Conv2d(4, 4, 3, padding='same')), 1),
    (subnet(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5)), 1),
    (subnet(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout2d(0.5)).eval(), 1),
])  # fmt: skip
def test_the_margin(expert, margin):
    assert sheets.margin_of(expert, 4) == margin


def test_what_falls_back_to_levels():
    """Batch norm in training, modules that were exchanged, and nothing to compute."""
    layer = layer_of(subnet(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
    assert not assert_same(layer, maps_of())
    layer.experts.eval()
    assert assert_same(layer, maps_of())
    for expert in layer.experts:
        expert[1] = nn.GroupNorm(2, 4).double()
    assert not assert_same(layer, maps_of())


@pytest.mark.parametrize(('change', 'used'), [
    ({'padding_mode': 'reflect'}, False),
    ({'kernel_size': 1, 'padding': 0}, True),
    ({'kernel_size': 5, 'padding': 2}, True),
])  # fmt: skip
def test_experts_that_differ(change, used):
    """Each is tried by itself, the widest margin is everybody's."""
    layer = layer_of(subnet())
    assert assert_same(layer, maps_of())
    other = nn.Conv2d(4, 8, **{'kernel_size': 3, 'padding': 1, **change})
    layer.experts[2][0] = other.double()
    assert bool(assert_same(layer, maps_of(((9, 12), (5, 6), (4, 4))))) == used


def test_an_item_has_random_numbers_of_its_own():
    """Dropout of whole channels would drop those of all items on a sheet, or of none."""
    layer = layer_of(subnet(nn.Conv2d(4, 64, 1), nn.Dropout2d(0.5)), num_experts=2, top_k=1)
    layer.experts.impl = 'sheets'
    state = torch.get_rng_state()
    sheets.margin_of(layer.experts[0], 4)
    assert torch.equal(torch.get_rng_state(), state)
    outputs = layer(maps_of(images=6))
    dropped = torch.cat([(y == 0).flatten(2).all(2) for y in outputs])
    assert len({tuple(row) for row in dropped.tolist()}) == len(dropped) == 24
    layer.eval()
    assert assert_same(layer, maps_of())


def test_outputs_may_be_changed_in_place():
    layer = layer_of(subnet())
    layer.experts.impl = 'sheets'
    (x, *others) = (m.requires_grad_() for m in maps_of())
    outputs = layer([x, *others])
    expected = torch.autograd.grad(sum(y.relu().sum() for y in outputs), x)
    outputs = [nn.functional.relu(y, inplace=True) for y in layer([x, *others])]
    found = torch.autograd.grad(sum(y.sum() for y in outputs), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
def test_first_called_without_gradients(mode):
    layer = layer_of(subnet()).eval()
    with mode():
        layer.experts.impl = 'sheets'
        found = layer(maps_of())
        layer.experts.impl = 'levels'
        expected = layer(maps_of())
    assert list(layer.experts._margins.values()) == [4]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('options', [
    {'granularity': 'pixel'}, {'granularity': 'pixel', 'whole_maps': True},
    {'granularity': 'patch', 'grid_size': 2, 'whole_maps': True},
])  # fmt: skip
def test_pixels_and_whole_maps_need_no_sheets(options):
    expert = nn.Conv2d(4, 3, 1) if options == {'granularity': 'pixel'} else subnet()
    assert not assert_same(layer_of(subnet(expert), **options), maps_of())


def test_one_map_and_a_stand_in_are_left_alone():
    layer = layer_of(subnet())
    layer.experts.impl = 'sheets'
    (x, *_) = maps = maps_of()
    alone = layer([x])[0]
    with pytest.raises(ConfigError, match=r"all levels at once.*here comes one, so use 'auto'"):
        layer(x)
    layer.experts.impl = 'auto'
    torch.testing.assert_close(layer(x), alone)
    layer.experts.impl = 'sheets'
    seen, run = [], layer.run_experts
    layer.run_experts = lambda x_T, dispatcher: seen.append(x_T.shape) or run(x_T, dispatcher)
    layer(maps)
    assert seen == [m.shape for m in maps]


def test_flops_are_those_of_the_items():
    layer = layer_of(subnet(), num_experts=3, top_k=2)
    layer.experts.impl = 'sheets'
    maps = maps_of(((8, 8), (4, 4)), images=1)
    per_pixel = 2 * (9 * 4 * 8 + 25 * 8 * 8 + 8 * 3)
    router = 2 * 4 * 3 * 2
    assert count_flops(layer, maps) == 2 * (64 + 16) * per_pixel + router
    assert layer.experts.impl == 'sheets'


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 7)), min_size=1,
             max_size=4),
    st.integers(0, 3),
)  # fmt: skip
def test_items_lie_apart(levels, margin):
    """Painted pixel by pixel: inside of the sheet, and nothing within the margin of another."""
    sizes, counts = [(h, w) for h, w, _ in levels], [n for *_, n in levels]
    width = sheets.sheet_width(sizes, margin)
    packing = sheets.pack(counts, sizes, width, margin)
    expanded = [size for size, n in zip(sizes, counts, strict=True) for _ in range(n)]
    assert len(packing.corners) == len(expanded)
    painted = torch.zeros(packing.height + margin, width + margin, dtype=torch.int64)
    for (y, x), (h, w) in zip(packing.corners, expanded, strict=True):
        assert y + h <= packing.height
        assert x + w <= width
        painted[y : y + h + margin, x : x + w + margin] += 1
    assert packing.height == 0 or painted.max() == 1


def test_a_field_asks_for_it():
    """By config: sheets give what level by level gives, and are refused where they cannot be."""

    def head(impl, norm_cfg=None, **options):
        torch.manual_seed(0)
        options = {'num_experts': 3, 'top_k': 2, 'router': {'type': 'GAPRouter'}, **options}
        return MODELS.build(
            {
                'type': 'mmdet_moe.MoERetinaHead', 'num_classes': 2, 'in_channels': 4,
                'feat_channels': 4, 'stacked_convs': 2, 'norm_cfg': norm_cfg, 'impl': impl,
                **options,
            }
        ).eval()  # fmt: skip

    maps = [m.float() for m in maps_of()]
    found = {'auto': head('auto')(maps)}
    used, through = [], sheets.Sheets.through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheets.Sheets, 'through', lambda s, e: used.append(s) or through(s, e))
        for impl in ('levels', 'sheets'):
            found[impl] = head(impl)(maps)
            assert (max((len(s.heights) for s in used), default=0) == 3) == (impl == 'sheets')
    for outputs in zip(*(itertools.chain(*found[impl]) for impl in found), strict=True):
        for y in outputs[1:]:
            torch.testing.assert_close(y, outputs[0])
    with pytest.raises(ConfigError, match=r"impl='sheets': .* cannot compute items side by side"):
        head('sheets', {'type': 'GN', 'num_groups': 2})
    for options in ({'granularity': 'pixel', 'whole_maps': True}, {'expert_parallel': 3}):
        with pytest.raises(ConfigError, match="'patch', without whole_maps and expert_parallel"):
            head('sheets', **options)
    with pytest.raises(ConfigError, match=r"impl='views' is unknown for .*'levels', 'sheets'"):
        head('views')
