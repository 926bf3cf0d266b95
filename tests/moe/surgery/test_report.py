"""The table of what became experts, against numbers by hand."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.moe import MoELayer, add_experts, report_of


class Model(nn.Module):
    """A stem, and a head of two layers that two levels share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)])
        self.cls = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return [self.head(level) for level in (x, x[..., ::2, ::2])]

    def head(self, x):
        for conv in self.convs:
            x = conv(x)
        return self.cls(x)


SIZE = 8
PIXELS = SIZE**2 + (SIZE // 2) ** 2  # of both levels
STEM = 2 * 3 * 4 * 9 * SIZE**2
HEAD = 2 * (4 * 8 * 9 + 8 * 5)  # for each pixel
ROUTER = 2 * 4 * 3  # logits of 3 experts
PARAMETERS = 4 * 8 * 9 + 2 * 8 + 8 * 5 + 5
ROUTERS_OWN = 4 * 3 + 3 + 4 * 3  # weights, bias, noise


def model_and_run(options):
    model = Model()
    add_experts(model, {'{convs,cls}': {'num_experts': 3, 'top_k': 2, **options}})
    return model, lambda: model(torch.randn(1, 3, SIZE, SIZE))


@pytest.mark.parametrize('shared', [0, 1])
def test_siblings_on_two_levels(shared):
    report = report_of(*model_and_run({'shared': shared}))
    (row,) = report.rows
    assert (row.path, row.kind) == ('convs_moe', '{convs,cls}')
    assert row.dense == PARAMETERS
    assert row.active == (2 + shared) * PARAMETERS + ROUTERS_OWN
    assert row.total == (3 + shared) * PARAMETERS + ROUTERS_OWN
    assert row.dense_flops == PIXELS * HEAD
    # The router decides for two levels.
    assert row.flops == (2 + shared) * PIXELS * HEAD + 2 * ROUTER
    whole = report.whole
    assert (whole.dense_flops, whole.flops) == (STEM + row.dense_flops, STEM + row.flops)
    assert whole.dense == sum(p.numel() for p in Model().parameters())
    assert whole.total == whole.dense - row.dense + row.total


def test_narrow_experts_are_compared_with_the_full_width():
    (row,) = report_of(*model_and_run({'width': 0.5})).rows
    assert row.width == 0.5
    assert row.dense_flops == PIXELS * HEAD
    assert row.flops == PIXELS * HEAD + 2 * ROUTER


def test_stacked_convolution():
    model = Model()
    add_experts(model, {'stem': {'num_experts': 3, 'granularity': 'patch', 'grid_size': 2}})
    (row,) = report_of(model, lambda: model(torch.randn(1, 3, SIZE, SIZE))).rows
    assert row.kind == 'Conv2d'
    assert row.dense_flops == STEM
    # A patch of 4×4 is computed with its border.
    side = SIZE // 2 + 2
    experts = 2 * 4 * (2 * 3 * 4 * 9) * side**2
    # The means over patches are products with what says where they lie, along each axis.
    means = 2 * 3 * (2 * SIZE * SIZE + 2 * SIZE * 2)
    assert row.flops == experts + means + 2 * 4 * 3 * 3


def test_a_layer_that_replaces_nothing():
    model = nn.Sequential(MoELayer(nn.Conv2d(4, 4, 1), 4, 2, in_channels=4))
    report = report_of(model, lambda: model(torch.randn(1, 4, 2, 2)))
    assert report.rows[0].kind == 'ModuleExperts'
    assert report.rows[0].flops == 2 * 2 * 16 * 4 + 2 * 4 * 4
    assert report.rows[0].dense is report.rows[0].dense_flops is report.whole.dense is None
    cells = str(report).splitlines()[1].split()
    assert cells[6:8] == ['-', '-']  # width and parameters of the dense module
    assert cells[-2] == '-'


class Demanding(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() < torch.inf else x


def test_a_module_that_wants_real_values():
    model = nn.Sequential(Demanding(4, 4))
    add_experts(model, {'0': {}})
    report = report_of(model, lambda: model(torch.randn(1, 4)))
    assert report.rows[0].dense_flops is report.whole.dense_flops is None
    assert report.whole.flops == 2 * 2 * 16 + 2 * 4 * 4


def test_without_a_run():
    report = report_of(model_and_run({})[0])
    assert report.rows[0].flops is report.whole.flops is None
    assert 'GFLOPs' not in str(report)
    assert str(report).splitlines()[1].startswith('convs_moe  {convs,cls}  3  2  0')


def test_the_model_stays_as_it_was():
    model, run = model_and_run({'router': {'type': 'mmdet_moe.GAPRouter', 'constraint': {
        'type': 'mmdet_moe.RelativeImportanceConstraint'}}})  # fmt: skip
    model.train()
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model)
    report_of(model, run)
    for (name, value), other in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert all(part.training for part in model.modules())
    wanted = [p.requires_grad for p in before.parameters()]
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert set(vars(model)['_forward_hooks']) == set(vars(before)['_forward_hooks'])
    assert not model.convs_moe._forward_pre_hooks
    with pytest.raises(RuntimeError, match='has not been run yet'):
        model.convs_moe.routing  # noqa: B018


def test_a_model_that_fails_stays_as_it_was():
    model, _ = model_and_run({})
    with pytest.raises(RuntimeError):
        report_of(model, lambda: (model(torch.randn(1, 3, 8, 8)), model(torch.randn(1, 2, 8, 8))))
    assert all(part.training for part in model.modules())
    assert not model.convs_moe._forward_pre_hooks
    assert not model.convs_moe.items
