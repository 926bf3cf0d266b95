"""A small Faster R-CNN with a mixture for every RoI, through the command line."""

import json
from pathlib import Path

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.runner.checkpoint import _load_checkpoint as read_checkpoint
from running import CONFIGS, logged

from mmdet_moe import cli

BASE = CONFIGS / '_base_'
CONFIG = """
_base_ = [
    '{base}/demo_runtime.py',
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '{base}/datasets/digit_scenes.py',
    '{base}/schedules/demo.py',
    '{base}/balancing/{balancing}.py',
]
model = dict(
    backbone=dict(
        depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None
    ),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=10, {head}),
    ),
)
load_from = None
"""
MOE = "type='mmdet_moe.MoEShared2FCBBoxHead', router={{_base_.router}}"


@pytest.fixture
def run(tmp_path, digit_scenes_folder, monkeypatch):
    """``run(work_dir, head, balancing, *options)`` trains for two iterations and validates."""
    monkeypatch.chdir(tmp_path)

    def train(work_dir, head=MOE, balancing='soft_importance', *options):
        text = CONFIG
        for name, value in (('base', BASE), ('head', head), ('balancing', balancing)):
            text = text.replace(f'{{{name}}}', str(value))
        Path('config.py').write_text(text)
        DetLocalVisualizer._instance_dict.clear()
        fields = [
            f'data_root={digit_scenes_folder}',
            'train_dataloader.batch_size=2',
            'train_dataloader.num_workers=0',
            'val_dataloader.num_workers=0',
            'train_pipeline.2.scale=(64,64)',
            'train_cfg.max_iters=2',
            'train_cfg.val_interval=2',
            'default_hooks.logger.interval=1',
            'randomness.seed=0',
        ]
        cli.run_train(['config.py', '--work-dir', work_dir, '--cfg-options', *fields, *options])
        return read_checkpoint(f'{work_dir}/iter_2.pth', map_location='cpu')['state_dict']

    return train


@pytest.mark.parametrize('balancing', ['soft_importance', 'hard_relative'])
@pytest.mark.sweep(keep=1 / 2)
def test_trains_validates_and_reports(run, balancing):
    state = run('w', MOE, balancing)
    assert all(torch.isfinite(value.float()).all() for value in state.values())
    losses = [line for line in logged('w') if 'loss' in line]
    assert len(losses) == 2
    for line in losses:
        soft = 'loss_moe_roi_head_bbox_head_shared_fcs' in line
        assert soft == (balancing == 'soft_importance')
    report = json.loads(Path('w/expert_utilization_val.json').read_text())
    (layer,) = report['layers'].values()
    assert list(report['layers']) == ['roi_head.bbox_head.shared_fcs']
    assert layer['num_items'] > 8  # RoIs of 8 images
    assert sum(layer['load']) == pytest.approx(1)


def test_dense_checkpoint_becomes_experts(run):
    dense = run('dense', "type='Shared2FCBBoxHead'", 'none', 'custom_hooks=[]')
    still = ('load_from=dense/iter_2.pth', 'optim_wrapper.optimizer.lr=0', 'param_scheduler=[]')
    moe = run('moe', MOE, 'soft_importance', *still)
    for name in ('0.weight', '0.bias', '1.weight', '1.bias'):
        for copied in moe[f'roi_head.bbox_head.shared_fcs.experts.{name}']:
            torch.testing.assert_close(copied, dense[f'roi_head.bbox_head.shared_fcs.{name}'])
