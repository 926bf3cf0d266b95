"""Features of a frozen backbone, computed once."""

import numpy as np
import pytest
import torch
from miniature import expect_cifar, write_cifar100
from mmengine.registry import DATASETS

from mmdet_moe.cli import load_config
from mmdet_moe.errors import ConfigError
from research import features
from research.experiments.experiment import CONFIGS
from research.features import FeatureCache


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Of a small backbone, which needs no weights of anybody."""
    expect_cifar(monkeypatch, write_cifar100(tmp_path / 'data', num_train=30, num_test=12))
    path = str(CONFIGS / 'efficientnet_lite0_dense_cifar100.py')
    cfg = load_config(path, {'data_root': str(tmp_path / 'data')})
    cfg.model.backbone = dict(type='ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4)
    cfg.model.head.in_channels = 32
    cfg.enlarge.scale = 32
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = 32
    monkeypatch.setattr(features, 'CHUNK', 10)
    monkeypatch.setattr(features, 'BATCH', 4)
    return cfg


def reference(cfg, model, split, indices):
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'split': split})
    samples = [dataset[i] for i in indices]
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    with torch.no_grad():
        return model.extract_feat(model.data_preprocessor(batch)['inputs'])[-1]


def test_features_are_the_models(cfg, tmp_path, monkeypatch):
    torch.manual_seed(0)
    cache = FeatureCache(cfg, tmp_path / 'cache')
    found, labels = cache.load('train')
    assert (found.shape, found.dtype) == ((30, 32), torch.float32)
    assert labels.tolist() == list(range(30)) == cache.labels('train').tolist()
    torch.testing.assert_close(found, reference(cfg, cache._model, 'train', range(30)))
    some, labels = cache.load('test', 'some', [3, 5, 7])
    torch.testing.assert_close(some, reference(cfg, cache._model, 'test', [3, 5, 7]))
    assert labels.tolist() == [3, 5, 7]

    # Again, and after a part was lost: what is there is read, and only the rest is computed.
    (tmp_path / 'cache' / 'train' / '000010.npy').unlink()
    again, model = FeatureCache(cfg, tmp_path / 'cache'), cache._model
    computed = []
    monkeypatch.setattr(again, '_build', lambda: computed.append(1) or model)
    torch.testing.assert_close(again.load('train')[0], found)
    assert computed == [1]


def test_changed_images(cfg, tmp_path):
    torch.manual_seed(0)
    cache = FeatureCache(cfg, tmp_path / 'cache')
    plain, _ = cache.load('test')
    black, _ = cache.load('test', 'black', change=np.zeros_like)
    assert not torch.allclose(plain, black)
    torch.testing.assert_close(black, black[:1].expand(12, -1))


def test_other_settings(cfg, tmp_path):
    FeatureCache(cfg, tmp_path / 'cache')
    FeatureCache(cfg, tmp_path / 'cache')
    cfg.data_preprocessor.mean = [0, 0, 0]
    with pytest.raises(ConfigError, match='features of other settings; move it away'):
        FeatureCache(cfg, tmp_path / 'cache')


def test_features_of_fewer_images(cfg, tmp_path):
    cache = FeatureCache(cfg, tmp_path / 'cache')
    cache.load('test', 'some', [3, 5, 7])
    with pytest.raises(ConfigError, match='features of other images: delete it'):
        cache.load('test', 'some', [3, 5])
