"""The heads on a frozen EfficientNet-Lite0: what they are, and a run in miniature."""

import pytest
import torch
from miniature import expect_cifar, write_cifar100
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS, logged
from torch import nn

from mmdet_moe import cli
from mmdet_moe.models import EfficientNetLite0
from mmdet_moe.moe import LinearExperts, MoELayer, TRMuMoE

HEADS = {'dense': nn.Linear, 'mumoe': TRMuMoE, 'moe': MoELayer}


def path_of(kind):
    return CONFIGS / f'efficientnet_lite0_{kind}_cifar100.py'


def test_all_are_there():
    assert {path_of(kind) for kind in HEADS} == set(CONFIGS.glob('efficientnet_*.py'))


@pytest.mark.parametrize('kind', HEADS)
def test_config_is_what_its_name_says(kind):
    cfg = Config.fromfile(path_of(kind))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, EfficientNetLite0)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    head = model.head.fc
    assert type(head) is HEADS[kind]
    numbers = sum(p.numel() for p in head.parameters())
    if kind == 'mumoe':
        assert head.num_experts == 16
        assert 0.98 * 128_100 < numbers <= 128_100
    if kind == 'moe':
        assert isinstance(head.experts, LinearExperts)
        assert (head.num_experts, head.top_k, head.granularity) == (16, 2, 'token')
    preprocessor = cfg.data_preprocessor
    assert (preprocessor.mean, preprocessor.std) == ([127.0] * 3, [128.0] * 3)
    assert not preprocessor.to_rgb
    assert preprocessor.num_classes == 100
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        resize, pack = loader.dataset.pipeline[-2:]
        assert resize == dict(type='Resize', scale=96, interpolation='bicubic')
        assert pack == dict(type='PackInputs')


@pytest.mark.parametrize('kind', ['mumoe', 'moe'])
def test_config_trains(kind, tmp_path, monkeypatch):
    """One epoch; the backbone and its statistics stay what they were."""
    folder = write_cifar100(tmp_path / 'data', num_train=40, num_test=10)
    expect_cifar(monkeypatch, folder)
    weights = EfficientNetLite0().state_dict()
    torch.save(weights, tmp_path / 'lite0.pth')
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / 'lite0.pth'))
    options = [f'data_root={folder.parent}', 'train_cfg.max_epochs=1']
    options += ['train_dataloader.batch_size=20']
    options += [f'{loader}_dataloader.num_workers=0' for loader in ('train', 'val')]
    options += [f'{x}_dataloader.persistent_workers=False' for x in ('train', 'val')]
    run = tmp_path / 'run'
    cli.run_train([str(path_of(kind)), '--work-dir', str(run), '--cfg-options', *options])
    saved = torch.load(run / 'epoch_1.pth', weights_only=False)['state_dict']
    for key, value in weights.items():
        assert torch.equal(saved[f'backbone.{key}'], value)
    assert any('accuracy/top1' in entry for entry in logged(run))
