"""Which modules a path names, against lists written by hand."""

import pytest
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.surgery.paths import find_places


def block():
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


class Special(nn.Conv2d):
    pass


@pytest.fixture
def model():
    return nn.ModuleDict(
        {
            'backbone': nn.ModuleDict(
                {'layer1': block(), 'layer2': nn.Sequential(block(), block())}
            ),
            'neck': nn.ModuleList([Special(2, 2, 1), nn.Linear(2, 2)]),
            'head': nn.ModuleDict({'a': block(), 'b': block()}),
        }
    )


@pytest.mark.parametrize(
    ('at', 'every', 'expected'),
    [
        ('backbone.layer1', None, ['backbone.layer1']),
        ('backbone.*', None, ['backbone.layer1', 'backbone.layer2']),
        ('backbone.*2', None, ['backbone.layer2']),
        ('backbone.layer2.*', None, ['backbone.layer2.0', 'backbone.layer2.1']),
        ('neck.*', None, ['neck.0', 'neck.1']),
        ('**.layer1', None, ['backbone.layer1']),
        ('backbone.**.0', None, ['backbone.layer1.0', 'backbone.layer2.0', 'backbone.layer2.0.0',
                                 'backbone.layer2.1.0']),
        ('backbone.layer2', 'Conv2d', ['backbone.layer2.0.0', 'backbone.layer2.1.0']),
        ('backbone', 'Sequential', ['backbone.layer1', 'backbone.layer2']),  # none inside another
        ('neck', 'Conv2d', ['neck.0']),  # a derived class
        ('neck.0', 'Conv2d', ['neck.0']),
        ('head.{a,b}', None, ['head.{a,b}']),
        ('*.{a, b}', None, ['head.{a,b}']),
    ],
)  # fmt: skip
def test_found(model, at, every, expected):
    if at.startswith('*.'):
        del model['backbone'], model['neck']
    assert [str(place) for place in find_places(model, at, every)] == expected


@pytest.mark.parametrize(
    ('at', 'every', 'message'),
    [
        ('backbone.layer5', None, '"backbone" has layer1, layer2'),
        ('bckbone.layer1', None, r'the model \(ModuleDict\) has backbone'),
        ('layer1', None, 'layer1 is at backbone.layer1'),
        ('backbone.layer2.7', None, '"backbone.layer2" has 0, 1'),
        ('head.{a,c}', None, '"head" has a, b'),
        ('neck.1', 'Conv2d', "every='Conv2d' names no module there; there are Linear"),
        ('head.{a,b}', 'Conv2d', 'cannot be combined with siblings'),
        ('', None, 'must be a dotted path'),
        ('backbone..layer1', None, 'must be a dotted path'),
    ],
)
def test_not_found(model, at, every, message):
    with pytest.raises(ConfigError, match=message):
        find_places(model, at, every)
