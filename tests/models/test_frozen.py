"""A frozen neck: same outputs, no gradients, no moving statistics."""

import copy

import pytest
import torch
from mmdet.registry import MODELS

from mmdet_moe.errors import ConfigError

NECK = {
    'type': 'mmdet.FPN',
    'in_channels': [4, 6],
    'out_channels': 5,
    'num_outs': 3,
    'norm_cfg': {'type': 'BN'},
}


@pytest.fixture
def frozen():
    return MODELS.build({'type': 'mmdet_moe.Frozen', 'module': NECK})


def inputs():
    return [
        torch.randn(2, 4, 8, 6, requires_grad=True),
        torch.randn(2, 6, 4, 3, requires_grad=True),
    ]


def test_outputs_and_names_of_the_module(frozen, randomise):
    dense = randomise(MODELS.build(NECK)).eval()
    frozen.load_state_dict(dense.state_dict())  # strict: the names are those of the module
    x = inputs()
    for a, b in zip(frozen(x), dense(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nothing_changes_in_training(frozen):
    model = torch.nn.ModuleDict({'neck': frozen}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = inputs()
    sum(y.sum() for y in model['neck'](x)).backward()
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m.training for m in frozen.modules())
    assert all(level.grad.any() for level in x)  # what lies before it can still train


BACKBONE = {
    'type': 'mmdet.ResNet',
    'depth': 18,
    'base_channels': 4,
    'stem_channels': 4,
    'out_indices': (1, 3),
}


def with_cache(folder, **changes):
    config = {'type': 'mmdet_moe.Frozen', 'module': {**BACKBONE, **changes}}
    return MODELS.build({**config, 'cache': str(folder)})


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A backbone with a cache, and the images that it has computed."""
    cached, computed = with_cache(tmp_path / 'cache'), []
    forward = type(cached).forward
    monkeypatch.setattr(
        type(cached), 'forward', lambda self, x: computed.append(len(x)) or forward(self, x)
    )
    return cached, computed


def test_what_comes_again_is_read(counted, tmp_path):
    cached, computed = counted
    plain = MODELS.build(BACKBONE)
    plain.eval()
    plain.load_state_dict(cached.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = plain(images)
    computed.clear()
    for rows in ([0, 1], [1, 0], [2, 1, 0]):
        for maps, of_all in zip(cached(images[rows]), expected, strict=True):
            torch.testing.assert_close(maps, of_all[rows])
    assert computed == [2, 1]
    again = with_cache(tmp_path / 'cache')  # of another process, say
    again.load_state_dict(plain.state_dict())
    again(images)
    assert computed == [2, 1]
    # A damaged file is computed again, and a copy of the model has the cache, too.
    files = list((tmp_path / 'cache').rglob('*.pt'))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:100])
    torch.testing.assert_close(copy.deepcopy(again)(images)[1], expected[1])
    assert computed == [2, 1, 1]


def test_nothing_is_read_of_something_else(counted, tmp_path):
    """Other weights, another config, another dtype and another padding are other results."""
    cached, computed = counted
    image = torch.randn(1, 3, 32, 32)
    first = cached(image)[0]
    with torch.no_grad():
        cached.conv1.weight.mul_(2)
    assert not torch.equal(cached(image)[0], first)
    other = with_cache(tmp_path / 'cache', out_indices=(0,))
    other.load_state_dict(cached.state_dict())
    assert len(other(image)) == 1
    cached(torch.nn.functional.pad(image, (0, 8)))
    with torch.autocast('cpu', torch.bfloat16):
        cached(image)
    assert computed == [1] * 5


def test_what_is_no_backbone_has_no_cache(tmp_path, monkeypatch):
    neck = MODELS.build({'type': 'mmdet_moe.Frozen', 'module': NECK, 'cache': str(tmp_path)})
    with pytest.raises(ConfigError, match='given a list instead of images'):
        neck(inputs())
    backbone = with_cache(tmp_path)
    for made in ([(torch.ones(2), torch.ones(2))], torch.ones(1), {'maps': torch.ones(2)}):
        monkeypatch.setattr(type(backbone), 'forward', lambda self, x, made=made: made)
        with pytest.raises(ConfigError, match='is for maps, one of each image'):
            backbone(torch.randn(2, 3, 32, 32))


def test_what_trains_has_no_cache(tmp_path):
    model = with_cache(tmp_path)
    model.layer4[0].conv1.requires_grad_(True)
    with pytest.raises(ConfigError, match=r'keep layer4\.0\.conv1\.weight from training'):
        model(torch.randn(1, 3, 32, 32))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'cache').touch()
    with pytest.raises(ConfigError, match='choose another folder'):
        with_cache(tmp_path / 'cache')(torch.randn(1, 3, 32, 32))
