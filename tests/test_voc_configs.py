"""The RetinaNets on EfficientNet-Lite0: what they are, and a run in miniature."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import logged
from test_configs import CONFIGS, VOC

from mmdet_moe import cli
from mmdet_moe.datasets.voc2007 import CLASSES
from mmdet_moe.models import EfficientNetLite0
from mmdet_moe.moe import find_moe_layers


@pytest.fixture
def root(tmp_path):
    """Three images to train with and one to validate with, as prepare_data.py lays them out."""
    (tmp_path / 'voc/images').mkdir(parents=True)
    for split, ids in (('train', (1, 2, 3)), ('val', (4,))):
        images = [dict(id=i, file_name=f'{i}.jpg', width=96, height=64) for i in ids]
        for image in images:
            pixels = np.random.default_rng(image['id']).integers(0, 255, (64, 96, 3), np.uint8)
            cv2.imwrite(str(tmp_path / 'voc/images' / image['file_name']), pixels)
        boxes = [
            dict(id=i, image_id=i, category_id=i, bbox=[9, 9, 50, 40], area=2000, iscrowd=0)
            for i in ids
        ]
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
        content = dict(images=images, annotations=boxes, categories=categories)
        (tmp_path / f'voc/{split}.json').write_text(json.dumps(content))
    return tmp_path / 'voc'


@pytest.mark.parametrize('path', VOC, ids=lambda path: path.stem)
def test_backbone_and_classes(path, tmp_path, monkeypatch):
    """The weights arrive, the first stages stay as they are, and every parameter is used."""
    weights = EfficientNetLite0().state_dict()
    torch.save(weights, tmp_path / 'lite0.pth')
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / 'lite0.pth'))
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert loaded.keys() == {key for key in weights if not key.startswith('layers.6.')}
    assert all(torch.equal(weights[key], value) for key, value in loaded.items())
    model.train()
    assert not any(m.training for m in model.backbone.modules() if hasattr(m, 'running_mean'))
    images = torch.randn(2, 3, 64, 96)
    sum(level.mean() for levels in model(images, mode='tensor') for level in levels).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    assert not any(name.startswith('backbone.layers.3.') for name in trained)
    assert any(name.startswith('backbone.layers.4.') for name in trained)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == CLASSES
    assert cfg.model.bbox_head.num_classes == len(CLASSES)
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.mean, preprocessor.std) == ([127.0] * 3, [128.0] * 3)
    assert preprocessor.bgr_to_rgb


def test_equal_experts_cost_what_the_dense_head_does():
    heads = []
    for kind in ('dense', 'moe_equal'):
        cfg = Config.fromfile(CONFIGS / f'retinanet_lite0_{kind}_voc2007.py')
        cfg.model.backbone.init_cfg = None
        init_default_scope('mmdet')
        heads.append(MODELS.build(cfg.model).bbox_head)
    layers = find_moe_layers(heads[1]).values()
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    dense = sum(p.numel() for p in heads[0].parameters())
    assert experts * 2 / 4 == pytest.approx(dense, rel=0.02)


def test_config_trains(root, tmp_path, monkeypatch):
    torch.save(EfficientNetLite0().state_dict(), tmp_path / 'lite0.pth')
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / 'lite0.pth'))
    options = [f'data_root={root}', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    options += ['train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']
    options += ['train_dataloader.dataset.pipeline.2.scale=(96,96)']
    options += [f'{x}_dataloader.num_workers=0' for x in ('train', 'val')]
    options += [f'{x}_dataloader.persistent_workers=False' for x in ('train', 'val')]
    run = tmp_path / 'run'
    path = CONFIGS / 'retinanet_lite0_moe_soft_voc2007.py'
    cli.run_train([str(path), '--work-dir', str(run), '--cfg-options', *options])
    names = set().union(*logged(run))
    assert {'loss_cls', 'loss_moe_bbox_head_cls_moe'} <= names
    assert (run / 'epoch_1.pth').is_file()
