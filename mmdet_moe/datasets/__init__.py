"""Data sets that the configs run on: generated ones, COCO, VOC, CIFAR, Fashion-MNIST, your own.

:mod:`mmdet_moe.datasets.rotated_pairs` makes a task of its own of any images, and
:mod:`mmdet_moe.datasets.joint` one data set of several; both are registered.
What :mod:`mmdet_moe.datasets.digit_scenes` writes and what :mod:`mmdet_moe.datasets.download` and
:mod:`mmdet_moe.datasets.fashion_mnist` fetch have the layouts that MMDetection's ``CocoDataset``
and MMPretrain's ``CIFAR10``, ``CIFAR100`` and ``FashionMNIST`` read.
:mod:`mmdet_moe.datasets.voc2007` and :mod:`mmdet_moe.datasets.yolo` convert to COCO's, and
:mod:`mmdet_moe.datasets.coco_check` looks for mistakes. ``tools/prepare_data.py`` is the command
line of all that lies on the disk.
"""

from mmdet_moe.datasets.joint import JointDataset
from mmdet_moe.datasets.rotated_pairs import RotatedPairs

__all__ = ['JointDataset', 'RotatedPairs']
