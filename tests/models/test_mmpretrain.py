"""The same layers and hooks in MMPretrain."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from running import logged

from mmdet_moe import cli

CONFIG = """
default_scope = 'mmpretrain'
data_root = 'data'
loader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='images',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
train_dataloader = val_dataloader = loader
val_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False),
    logger=dict(type='LoggerHook', interval=1),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdet_moe.MoEResNet', depth=18, stem_channels=8, base_channels=8,
                  out_indices=(3,), norm_eval=False, moe_stages=4, num_experts=3, top_k=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64,
              loss=dict(type='CrossEntropyLoss')),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.KLLoss')),
]
"""


def test_classifier_trains_with_hooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / 'data' / 'images' / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{i}.png'), image)
    Path('classifier.py').write_text(CONFIG)
    cli.run_train(['classifier.py', '--work-dir', 'run'])
    losses = [entry for entry in logged('run') if 'loss' in entry]
    assert len(losses) == 2
    for entry in losses:
        assert entry['loss_moe_backbone_layer4'] >= 0
        # The cross-entropy has no entry of its own next to the sum.
        assert entry['loss'] > entry['loss_moe_backbone_layer4']
    report = json.loads(Path('run/expert_utilization_val.json').read_text())
    assert report['layers']['backbone.layer4']['num_items'] == 8
    assert sum(report['layers']['backbone.layer4']['load']) == pytest.approx(1)
