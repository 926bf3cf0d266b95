"""The layers of a model, as a table."""

import pytest
import torch
from torch import nn

from mmdet_moe.moe.surgery.survey import survey, table


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Merge(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, bias, scales=()):
        return self.fc(x) + bias, *scales


class Model(nn.Module):
    """Something of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.points = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(3)])
        self.eager = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.global_ = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
        self.attention = Attention()
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.merge = Merge()
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.merge.fc.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.idle = nn.Linear(8, 8)
        self.query = nn.Parameter(torch.randn(2, 8))

    def forward(self, x):
        x = self.stem(x)
        for point in self.points:
            x = point(point(x))
        x = self.global_(self.eager(x))
        tokens = self.ffn(self.attention(x.flatten(2).mT))
        y, *_ = self.merge(tokens, self.query[0])
        return self.frozen(self.tied(y)) + self.tied(self.query[:, None])


@pytest.fixture
def infos():
    model = Model()
    before = [p.requires_grad for p in model.parameters()]
    found = survey(model, lambda: model(torch.randn(2, 3, 16, 16)))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == before
    assert not model._forward_hooks
    return {info.label: info for info in found}


def test_rows(infos):
    """In the order of the model; nothing that was not called, nor normalisation."""
    assert list(infos) == [
        '(all)', 'stem', 'stem.0', 'points.* (3)', 'eager', 'eager.1', 'global_', 'global_.0',
        'attention', 'attention.qkv', 'ffn', 'ffn.0', 'ffn.2', 'merge', 'merge.fc', 'tied',
        'frozen',
    ]  # fmt: skip


def test_numbers(infos):
    stem, points = infos['stem'], infos['points.* (3)']
    assert (stem.inputs, stem.output) == ((2, 3, 16, 16), (2, 8, 8, 8))
    assert stem.flops == 2 * 2 * 8 * 3 * 9 * 64
    assert points.paths == ['points.0', 'points.1', 'points.2']
    assert points.calls == 2
    assert points.parameters == 3 * 72
    assert points.flops == 3 * 2 * 2 * 2 * 8 * 8 * 64
    assert infos['(all)'].flops > infos['ffn'].flops == 2 * 2 * 64 * 2 * 8 * 16
    assert infos['(all)'].parameters == sum(p.numel() for p in Model().parameters())


@pytest.mark.parametrize(
    ('label', 'granularities'),
    [
        ('stem', ('image', 'patch')),
        ('points.* (3)', ('image', 'patch', 'pixel')),
        ('global_', ('image',)),
        ('attention', ('image',)),
        ('attention.qkv', ('image', 'token')),
        ('ffn', ('image', 'token')),
    ],
)
def test_granularities(infos, label, granularities):
    assert infos[label].obstacle is None
    assert infos[label].granularities == granularities


@pytest.mark.parametrize(
    ('label', 'obstacle'),
    [
        ('(all)', 'is the model'),
        ('eager', 'begins in place'),
        ('merge', 'takes 2 tensors, not all of the same items'),
        ('merge.fc', 'shares its weights with "tied"'),
        ('frozen', 'is frozen'),
    ],
)
def test_obstacles(infos, label, obstacle):
    assert infos[label].obstacle == obstacle
    assert infos[label].granularities == ()


def test_places_and_depth():
    model, x = Model(), torch.randn(2, 3, 16, 16)
    labels = [info.label for info in survey(model, lambda: model(x), ['ffn', 'merge'], depth=0)]
    assert labels == ['(all)', 'ffn', 'ffn.0', 'ffn.2', 'merge']
    labels = [info.label for info in survey(model, lambda: model(x), depth=1)]
    assert 'stem.0' in labels  # a number is no name
    assert 'merge.fc' not in labels


def test_lists_of_several_kinds():
    """A glob that would name more than is meant is not printed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    labels = [info.label for info in survey(model, lambda: model(torch.randn(2, 4)))]
    assert labels == ['(all)', '0 (+1 alike)']


def test_table(infos):
    header, first, *_, last = table(list(infos.values())).split('\n')
    assert header.split()[:3] == ['path', 'layer', 'input']
    assert '100%' in first
    assert last.endswith('not: is frozen')
    assert len({line.index('Linear') for line in (last,)}) == 1
