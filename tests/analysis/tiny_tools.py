"""A tiny classifier and a tiny detector: config, checkpoint and images."""

import json

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
from running import ROOT

from mmdet_moe import cli

IMAGES = 12
CLASSIFIER = """
default_scope = 'mmpretrain'
data_root = 'ROOT'
loader = dict(
    batch_size=5, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='MarkedImages', data_root=data_root, data_prefix='images',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
train_dataloader = val_dataloader = test_dataloader = loader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier',
    experts=[dict(at='head.fc', num_experts=3, top_k=2, granularity='token')],
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32,
              loss=dict(type='CrossEntropyLoss')),
)
"""
DETECTOR = f"""
_base_ = '{ROOT}/configs/demo/retinanet_moe_soft_digits.py'
model = dict(
    backbone=dict(base_channels=4, stem_channels=4),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    bbox_head=dict(
        in_channels=8, feat_channels=8, stacked_convs=1, num_experts=3,
        norm_cfg=dict(type='GN', num_groups=2),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=100, score_thr=0.0),
)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
load_from = None
"""


@DATASETS.register_module()
class MarkedImages(CustomDataset):
    """Every third image belongs to a group."""

    def get_data_info(self, idx):
        group = {'group': 'no mark' if idx % 3 else 'mark'}
        return {**super().get_data_info(idx), **group}


class Tool:
    def __init__(self, folder, text, data_root):
        self.folder = folder
        self.config = folder / 'tiny.py'
        self.config.write_text(text)
        self.checkpoint = folder / 'tiny.pth'
        self.options = ['--cfg-options', f'data_root={data_root}']
        cfg = cli.load_config(str(self.config), {'data_root': str(data_root)})
        torch.manual_seed(1)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
        content = {
            'state_dict': model.state_dict(), 'meta': {'epoch': 3}, 'optimizer': {'state': {}}
        }  # fmt: skip
        torch.save(content, self.checkpoint)

    def argv(self, out, *edits, checkpoint=None, more=()):
        edits = [argument for edit in edits for argument in ('--edit', edit)]
        checkpoint = str(checkpoint or self.checkpoint)
        return [
            str(self.config), checkpoint, *edits, '--out', str(out), '--device', 'cpu', *more,
            *self.options,
        ]  # fmt: skip

    def test(self, checkpoint, folder):
        """What the ordinary test tool says."""
        argv = [str(self.config), str(checkpoint), '--work-dir', str(folder), *self.options]
        cli.run_test(argv)
        return json.loads(next(folder.glob('*/*.json')).read_text())


def tiny_classifier(folder):
    """One whose images are in three folders, every third of them in a group."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        images = folder / 'data' / 'images' / 'abc'[i % 3 if i % 2 else 0]
        images.mkdir(parents=True, exist_ok=True)
        low = 20 * i
        pixels = rng.integers(low, low + 30, (32, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(images / f'{i}.png'), pixels)
    return Tool(folder, CLASSIFIER.replace('ROOT', str(folder / 'data')), folder / 'data')
