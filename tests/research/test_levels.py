"""Objects by level, against an assignment by brute force."""

import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from running import CONFIGS
from torchvision.ops import box_iou

from mmdet_moe.cli import apply_data_root
from research.levels import information_on_level, positives_per_level

CONFIG = CONFIGS / 'demo' / 'retinanet_dense_digits.py'


def test_positives_by_brute_force(digit_scenes_folder):
    """RetinaNet's rule: an IoU of at least 0.5 with an object, or the best one of an object.

    Which of several best anchors are equally good depends on rounding: these are bounds.
    """
    cfg = Config.fromfile(CONFIG)
    apply_data_root(cfg, str(digit_scenes_folder))
    cfg.val_dataloader.dataset.indices = 3
    counts = positives_per_level(cfg)

    coco = COCO(str(digit_scenes_folder / 'annotations' / 'instances_val2017.json'))
    least, most = np.zeros(5), np.zeros(5)
    anchors = []
    for level, stride in enumerate((8, 16, 32, 64, 128)):
        side = math.ceil(192 / stride)
        for y, x in np.ndindex(side, side):
            for ratio in (0.5, 1, 2):
                for octave in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
                    height = 4 * stride * octave * math.sqrt(ratio)
                    width = 4 * stride * octave / math.sqrt(ratio)
                    cx, cy = x * stride, y * stride
                    box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                    anchors.append((level, box))
    for image in sorted(coco.getImgIds())[:3]:
        boxes = []
        for annotation in coco.imgToAnns[image]:
            x, y, w, h = (value * 192 / 128 for value in annotation['bbox'])
            boxes.append((x, y, x + w, y + h))
        of_anchors = torch.tensor([anchor for _, anchor in anchors]).double()
        table = box_iou(of_anchors, torch.tensor(boxes).double()).numpy()
        overlapping = table.max(axis=1) >= 0.5
        among_the_best = (table > table.max(axis=0) - 1e-5).any(axis=1)
        levels = np.array([level for level, _ in anchors])
        least += np.bincount(levels[overlapping], minlength=5)
        most += np.bincount(levels[overlapping | among_the_best], minlength=5)
    assert (least <= counts.numpy()).all()
    assert (counts.numpy() <= most).all()
    assert least.sum() > 0.8 * most.sum() > 0


def test_information_counts_levels_as_told():
    shares = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    # Only the first two levels count, and equally: the level says everything about the expert.
    even = information_on_level(shares, torch.tensor([7.0, 7.0, 0.0]))
    assert even == pytest.approx(math.log(2))
    # One level alone says nothing.
    assert information_on_level(shares, torch.tensor([0.0, 0.0, 3.0])) == pytest.approx(0)
