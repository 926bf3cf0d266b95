"""Every config is built, and the COCO configs run on a small folder in COCO's layout."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from running import CONFIGS

from mmdet_moe import cli, moe

COCO = sorted(CONFIGS.glob('*_coco.py'))
VOC = sorted(CONFIGS.glob('*_voc2007.py'))
DEMO = sorted((CONFIGS / 'demo').glob('retinanet_*.py'))
#: Other files of tests look at these: test_*_configs.py.
OTHERS = [
    path
    for kind in ('resnet18', 'mlp_mixer', 'moe_rotate', 'efficientnet_lite0', 'yolox')
    for path in CONFIGS.glob(f'{kind}_*.py')
]

# What a reader expects of a name: where the experts sit, and what balances them.
HEADS = {
    'retinanet': {'bbox_head.cls_moe', 'bbox_head.reg_moe'},
    'faster_rcnn': {'roi_head.bbox_head.shared_fcs'},
}
PLACES = {'neck': {f'neck.fpn_convs.{i}' for i in range(3)}, 'backbone': {'backbone.layer4'}}
BALANCING = {
    'soft_kl': ('KLLoss', None),
    'soft': ('ImportanceLoss', None),
    'hard_mean': (None, moe.MeanImportanceConstraint),
    'hard': (None, moe.RelativeImportanceConstraint),
    'loss_free': (None, moe.BiasBalancing),
    'switch': ('SwitchLoss', None),
    'damex': ('DatasetLoss', None),
    'neck': ('ImportanceLoss', None),
    'equal': ('ImportanceLoss', None),
    'backbone': ('KLLoss', None),
    'unbalanced': (None, None),
    'patch': ('ImportanceLoss', None),
    'pixel_sharp': ('EntropyLoss', None),
    'pixel': ('ImportanceLoss', None),
}


@pytest.mark.parametrize('path', [*COCO, *VOC, *DEMO], ids=lambda path: path.stem)
def test_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    # No weights, which nothing here is about; EfficientNet reads numbers from tensors.
    with torch.device('cpu' if path in VOC else 'meta'):
        layers = moe.find_expert_layers(MODELS.build(cfg.model))
    if '_mumoe_' in path.stem:
        assert set(layers) == {f'neck.lateral_convs.{i}' for i in range(3)}
        for layer in layers.values():
            assert layer.num_experts == (64 if path in COCO else 16)
            dense = sum(p.numel() for p in layer.dense.parameters())
            assert 0.9 * dense < sum(p.numel() for p in layer.parameters()) <= dense
        return
    if '_moe_' not in path.stem:
        assert not layers
        return
    detector, name = path.stem.replace('_lite0', '').split('_moe_')
    places = (v for k, v in PLACES.items() if name.startswith(k))
    assert set(layers) == next(places, HEADS[detector])
    loss, constraint = next(v for k, v in BALANCING.items() if name.startswith(k))
    losses = [hook['loss'] for hook in cfg.custom_hooks if 'loss' in hook]
    losses = [one for some in losses for one in (some if isinstance(some, list) else [some])]
    assert {one['type'] for one in losses} == ({f'mmdet_moe.{loss}'} if loss else set())
    for layer in layers.values():
        usual = 'patch' if name.startswith('neck') else 'image'
        assert layer.granularity == next((g for g in ('patch', 'pixel') if g in name), usual)
        assert (layer.num_experts, layer.top_k) == (4, 2)
        actual = layer.router.constraint
        assert actual is None if constraint is None else type(actual) is constraint


def test_every_config_is_looked_at():
    assert {*COCO, *VOC, *OTHERS} == set(CONFIGS.glob('*.py'))


def test_base_line_swaps_the_balancing():
    """Soft and hard differ in one `_base_` line and the comment."""
    soft, hard = (
        (CONFIGS / f'retinanet_moe_{kind}_coco.py').read_text().splitlines()[1:]
        for kind in ('soft', 'hard')
    )
    different = [(a, b) for a, b in zip(soft, hard, strict=True) if a != b]
    assert [line.strip() for pair in different for line in pair] == [
        "'./_base_/balancing/soft_importance.py',",
        "'./_base_/balancing/hard_relative.py',",
    ]


@pytest.fixture(scope='module')
def coco_folder(tmp_path_factory):
    """Two images with objects of two of COCO's 80 classes, in COCO's layout."""
    root = tmp_path_factory.mktemp('coco')
    names = CocoDataset.METAINFO['classes']
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        images, annotations = [], []
        for i in (1, 2):
            image = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            cv2.imwrite(str(root / split / f'{i:012d}.jpg'), image)
            images.append(dict(id=i, file_name=f'{i:012d}.jpg', height=96, width=128))
            annotations.append(
                dict(id=i, image_id=i, category_id=i, bbox=[20, 20, 50, 40], area=2000, iscrowd=0)
            )
        categories = [dict(id=i, name=name) for i, name in enumerate(names, start=1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


# The images stay small and nothing is downloaded; everything else is as the config says.
UNCHANGED_BUT_SMALL = (
    'model.backbone.init_cfg=None',
    'train_dataloader.dataset.pipeline.2.scale=(128,96)',
    'train_dataloader.dataset.filter_cfg.min_size=16',
    'val_dataloader.dataset.pipeline.1.scale=(128,96)',
    'train_cfg.max_epochs=1',
)


@pytest.mark.sweep(keep=1 / 7)
@pytest.mark.parametrize(
    'name',
    [
        *(f'retinanet_moe_{kind}_coco' for kind in ('soft', 'hard', 'neck', 'backbone')),
        'retinanet_moe_soft_finetune_coco',
        'retinanet_mumoe_coco',
        'faster_rcnn_moe_soft_coco',
    ],
)
def test_coco_config_trains(name, coco_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DetLocalVisualizer._instance_dict.clear()
    options = [f'data_root={coco_folder}', *UNCHANGED_BUT_SMALL]
    if 'finetune' in name:
        dense = Config.fromfile(CONFIGS / 'retinanet_dense_coco.py')
        dense.model.backbone.init_cfg = None
        init_default_scope('mmdet')
        state = MODELS.build(dense.model).state_dict()
        torch.save(dict(state_dict=state, meta={}), 'dense.pth')
        options.append('load_from=dense.pth')
    cli.run_train([str(CONFIGS / f'{name}.py'), '--work-dir', 'run', '--cfg-options', *options])
    trained = torch.load('run/epoch_1.pth', map_location='cpu', weights_only=False)['state_dict']
    assert all(torch.isfinite(value.float()).all() for value in trained.values())
    if 'finetune' in name:
        # Frozen parts are bitwise what they were; the experts moved.
        for key, value in state.items():
            if key.startswith(('backbone.', 'neck.')):
                assert torch.equal(trained[key], value), key
        first = trained['bbox_head.cls_moe.experts.0.cls_convs.0.conv.weight']
        assert not torch.equal(first, state['bbox_head.cls_convs.0.conv.weight'])
        torch.testing.assert_close(
            first, state['bbox_head.cls_convs.0.conv.weight'], rtol=0, atol=1e-3
        )


def test_environment_variable_moves_the_data(monkeypatch):
    monkeypatch.setenv('COCO_ROOT', '/somewhere/coco')
    cfg = Config.fromfile(CONFIGS / 'retinanet_moe_soft_coco.py')
    assert cfg.train_dataloader.dataset.data_root == '/somewhere/coco'
    assert cfg.val_evaluator.ann_file == '/somewhere/coco/annotations/instances_val2017.json'
