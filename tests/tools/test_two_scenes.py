"""Two data sets in one detector: training with the data-set loss, and expert against data set."""

import json
import pickle
from pathlib import Path

import miniature
import numpy as np
import pytest
from mmdet.visualization import DetLocalVisualizer
from running import CONFIGS, logged

from mmdet_moe import cli
from mmdet_moe.analysis import command
from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.analysis.report.figures import draw_figures
from mmdet_moe.datasets.digit_scenes import generate

CONFIG = CONFIGS / 'demo/retinanet_moe_damex_two_scenes.py'
SMALL = (
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'model.backbone.base_channels=8',
    'model.backbone.stem_channels=8',
    'model.neck.in_channels=[8,16,32,64]',
    'model.neck.out_channels=32',
    'model.bbox_head.in_channels=32',
    'model.bbox_head.feat_channels=32',
    'train_dataloader.dataset.pipeline.2.scale=(96,96)',
    'val_dataloader.dataset.pipeline.1.scale=(96,96)',
    'test_dataloader.dataset.pipeline.1.scale=(96,96)',
    'default_hooks.logger.interval=1',
    'log_processor.window_size=1',
    'randomness.seed=0',
    'train_cfg.max_iters=60',
    'train_cfg.val_interval=60',
    'default_hooks.checkpoint.interval=60',
    'param_scheduler=[]',
    'custom_hooks.1.loss.weight=1.0',
)
SOURCES = ('objects', 'detections', 'decisions')
LAYERS = ('bbox_head.cls_moe', 'bbox_head.reg_moe')


@pytest.fixture
def folders(tmp_path, digit_scenes_folder, monkeypatch):
    """The roots of both data sets; the second has 6 images of each split."""
    sprites = miniature.write_fashion_mnist(tmp_path / 'idx')
    generate(tmp_path / 'fashion', 6, 6, 128, 0, sprites='fashion-mnist', source=sprites)
    monkeypatch.setenv('DIGIT_SCENES_ROOT', str(digit_scenes_folder))
    monkeypatch.setenv('FASHION_SCENES_ROOT', str(tmp_path / 'fashion'))
    monkeypatch.chdir(tmp_path)
    return digit_scenes_folder, tmp_path / 'fashion'


@pytest.mark.usefixtures('quick_analysis')
@pytest.mark.sweep(keep=0)  # takes long
def test_experts_follow_the_data_set(folders, monkeypatch):
    drawn = set()  # but not written

    def draw(experts, folder):
        drawn.update(found[:2] for found in draw_figures(experts))

    monkeypatch.setattr(command, 'write_figures', draw)
    DetLocalVisualizer._instance_dict.clear()
    cli.run_train([str(CONFIG), '--work-dir', 'run', '--cfg-options', *SMALL])
    log = logged('run')
    assert any({'digits/coco/bbox_mAP', 'fashion/coco/bbox_mAP'} <= set(step) for step in log)
    for layer in LAYERS:
        key = 'loss_moe_' + layer.replace('.', '_')
        losses = [step[key] for step in log if key in step]
        assert losses[0] > 0.5  # a router that knows nothing pays log 2
        assert np.mean(losses[-10:]) < 0.15
    report = json.loads(Path('run/expert_utilization_val.json').read_text())
    for layer in LAYERS:
        found = report['layers'][layer]
        # Those of the validation are told apart less well than those of so short a training.
        assert np.sum(found['source_shares'][1][2:]) > 0.8
        assert found['mi_source'] > 0.05
    tested = [str(CONFIG), 'run/iter_60.pth', '--tta', '--out', 'found.pkl']
    cli.run_test([*tested, '--cfg-options', *SMALL])
    found = pickle.loads(Path('found.pkl').read_bytes())
    contents = [
        json.loads((root / 'annotations/instances_val2017.json').read_text()) for root in folders
    ]
    assert len(found) == sum(len(content['images']) for content in contents)
    arguments = ['--out', 'out', '--device', 'cpu', '--split', 'train', '--no-interventions']
    run_analysis([str(CONFIG), 'run/iter_60.pth', *arguments, '--cfg-options', *SMALL])
    experts = json.loads(Path('out/experts.json').read_text())
    for layer in LAYERS:
        assert {(layer, f'{source}_dataset') for source in SOURCES} <= drawn
    assert len(experts['run']['classes']) == 20
    contents = [
        json.loads((root / 'annotations/instances_train2017.json').read_text()) for root in folders
    ]
    for layer in LAYERS:
        found = experts['layers'][layer]['associations']
        objects, decisions = found['objects']['dataset'], found['decisions']['dataset']
        assert objects['bins'] == decisions['bins'] == ['digits', 'fashion']
        counts = np.array(objects['counts'])
        expected = [len(content['annotations']) for content in contents]
        np.testing.assert_allclose(counts.sum(1), expected)
        own = counts[0, :2].sum() + counts[1, 2:].sum()
        assert own > 0.9 * counts.sum()  # 0.6 without the loss
        # Five levels decide for each image.
        expected = [5 * len(content['images']) for content in contents]
        np.testing.assert_allclose(np.sum(decisions['counts'], 1), expected)
