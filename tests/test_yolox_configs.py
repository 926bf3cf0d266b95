"""The YOLOX-nano that becomes sparse by path: where its experts are, and how it starts."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS

from mmdet_moe.moe import find_moe_layers
from mmdet_moe.moe.flops import count_flops

BACKBONE = {'backbone.stage4'}
NECK = {f'neck.{way}_blocks.{i}' for way in ('top_down', 'bottom_up') for i in (0, 1)}
HEAD = {f'bbox_head.multi_level_{of}_convs.{i}' for of in ('cls', 'reg') for i in (0, 1, 2)}
PLACES = {'backbone': BACKBONE, 'neck': NECK, 'head': HEAD, 'all': BACKBONE | NECK | HEAD}


def config(kind):
    return Config.fromfile(CONFIGS / f'yolox_nano_{kind}_coco_subset.py')


def test_all_are_there():
    stems = {f'yolox_nano_{kind}_coco_subset' for kind in ('dense', *(f'moe_{p}' for p in PLACES))}
    assert stems == {path.stem for path in CONFIGS.glob('yolox_*.py')}


@pytest.mark.parametrize('place', PLACES)
def test_experts_start_as_the_dense_model_at_its_cost(place):
    init_default_scope('mmdet')
    dense, sparse = (MODELS.build(config(k).model) for k in ('dense', f'moe_{place}'))
    for parameter in dense.parameters():  # those of the dense one count, whatever is drawn
        torch.nn.init.normal_(parameter, std=0.2)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    layers = find_moe_layers(sparse)
    assert set(layers) == PLACES[place]
    assert {(layer.num_experts, layer.top_k) for layer in layers.values()} == {(4, 1)}
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        outputs, expected = (m.eval()(images, mode='tensor') for m in (sparse, dense))
    for ours, theirs in zip(outputs, expected, strict=True):
        for level, of_dense in zip(ours, theirs, strict=True):
            torch.testing.assert_close(level, of_dense, rtol=1e-4, atol=1e-5)
    # The routers alone come on top, of which the smallest is at a map of 2 x 2.
    assert 1 < count_flops(sparse, images[:1]) / count_flops(dense, images[:1]) < 1.001


def test_weights_and_data_are_where_the_environment_says(monkeypatch):
    monkeypatch.setenv('YOLOX_NANO', '/weights/nano.pth')
    monkeypatch.setenv('COCO_SUBSET_ROOT', '/data/some')
    cfg = config('moe_all')
    assert cfg.load_from == '/weights/nano.pth'
    assert cfg.val_evaluator.ann_file == '/data/some/val.json'
    # Routers are new, and learn faster than what is trained already.
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.router.lr_mult > 1
