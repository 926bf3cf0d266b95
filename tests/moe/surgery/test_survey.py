"""The layers of a model, as a table."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import add_experts
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


@pytest.fixture(scope='module')
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
        'attention', 'attention.qkv', 'ffn', 'ffn.0', 'ffn.2', 'merge', 'tied',
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
        ('eager', 'begins with a layer that changes its input in place'),
        ('merge', 'shares its weights with "tied", which would be left with weights of its own'),
        ('frozen', 'is frozen'),
    ],
)
def test_obstacles(infos, label, obstacle):
    assert infos[label].obstacle.split('; ')[0] == obstacle
    assert infos[label].granularities == ()


class Weighted(nn.Module):
    """Does not tell its channels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x, others=None):
        return torch.einsum('nchw,cd->ndhw', x, self.weight) + (0 if others is None else others[0])


class LinearNorm(nn.Module):
    """Computes single tokens, but only of sequences."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.fc(x)
        return self.norm(x.flatten(0, 1)).view_as(x)


class Pairs(nn.Conv2d):
    """Knows how many images there are."""

    def forward(self, x):
        return super().forward(x) + x.unflatten(0, (2, 1)).mean(0)


class Awkward(nn.Module):
    """What looks as if it could become experts, and what does not."""

    def __init__(self):
        super().__init__()
        self.folds = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 1))
        self.weighted = Weighted()
        self.mixes = Weighted()
        self.unpadded = nn.Conv2d(8, 8, 3)
        self.pairs = Pairs(8, 8, 1)
        self.read = nn.Conv2d(8, 8, 1)
        self.asked = nn.Conv2d(8, 8, 1)
        self.steps = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.last = nn.Linear(8, 8)
        self.tokens = LinearNorm()
        self.twice = nn.Linear(8, 8)
        self.experts = nn.Conv2d(8, 8, 1)
        add_experts(self, {'experts': {}})

    def forward(self, x):
        x = self.unpadded(self.weighted(self.folds(x)))  # 16×16, 8×8, 6×6
        x = self.asked(self.read(self.mixes(self.pairs(self.experts(x)), x[:, :1, 0, 0])))
        x = x * self.read.weight.mean() * self.asked.kernel_size[0]
        x = nn.functional.pad(x, (1, 1, 1, 1))  # as many rows and columns as channels
        x = self.steps(x) + sum(step(x) for step in self.steps)
        x = self.last(x.movedim(1, 3))
        return self.twice(self.twice(self.tokens(x.flatten(1, 2))).unflatten(1, (4, 16)))

    def loss(self, x):
        return self(x).sum() * self.asked.bias.sum()


@pytest.fixture(scope='module')
def awkward():
    model, x = Awkward().eval(), torch.randn(2, 3, 16, 16)
    before = list(model.named_modules())
    infos = survey(model, lambda: model(x), also=[lambda: 1 / 0, lambda: model.loss(x)])
    assert list(model.named_modules()) == before
    return model, {info.label: info for info in infos}


@pytest.mark.parametrize(
    ('label', 'found'),
    [
        ('folds', 'image, patch (in_channels=3)'),
        ('folds.1', 'image, patch, pixel'),
        ('weighted', 'image, patch, pixel (in_channels=8)'),
        ('mixes', 'not: is called with another tensor of shape (2, 1) beside its input'),
        ('unpadded', 'image'),
        ('pairs', 'not: its experts fail (RuntimeError'),
        ('read', 'not: the model reads its attribute "weight"'),
        ('asked', 'not: the model reads its attribute "bias"'),  # for the loss
        ('steps', 'not: the model reads its attribute "__iter__"'),
        ('last', 'image, token'),
        ('tokens', 'image'),
        ('twice', 'token'),
        ('experts', 'not: holds the MoE layer "experts" already'),
    ],
)
def test_what_add_experts_would_say(awkward, label, found):
    row = next(
        row for row in table(list(awkward[1].values())).split('\n') if row.split()[0] == label
    )
    assert row.rpartition('%  ')[2].startswith(found)
    assert found.startswith('not') or row.endswith(found)


def test_what_is_listed_can_be_and_nothing_else(awkward):
    """Each place, in each way, on items that the router sends where it likes."""
    model, infos = awkward
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x), model.loss(x)
    tried = 0
    for info in infos.values():
        for path in info.paths[info.label == '(all)' :]:
            for granularity in ('image', 'patch', 'pixel', 'token'):
                other = copy.deepcopy(model)
                options = {'granularity': granularity, 'grid_size': 1 + (granularity == 'patch')}
                options['in_channels'] = info.in_channels
                try:
                    add_experts(other, {path: options})
                    found = other(x), other.loss(x)
                except (ConfigError, RuntimeError, TypeError, ValueError):
                    found = None
                if granularity in info.granularities:
                    torch.testing.assert_close(found, wanted)
                    tried += 1
                elif path != 'pairs':  # for which all images may come to one expert
                    assert found is None or not torch.allclose(found[0], wanted[0])
    assert tried == 18


def test_a_single_vector():
    """There is nothing to route."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(8, 3)), torch.randn(2, 4)
    infos = {info.label: info for info in survey(model, lambda: model(x))}
    assert infos['0'].granularities == ('image', 'token')
    assert infos['2'].obstacle == 'its input has the shape (8,)'


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
