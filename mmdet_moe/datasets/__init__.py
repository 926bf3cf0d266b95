<<<<<<< HEAD
"""Data sets that the configs run on.

:mod:`mmdet_moe.datasets.cluster_patches` is registered and generates its samples in memory. What
:mod:`mmdet_moe.datasets.digit_scenes` writes and what :mod:`mmdet_moe.datasets.download` unpacks
(COCO and CIFAR-100) have the layouts that MMDetection's ``CocoDataset`` and MMPretrain's
``CIFAR100`` read; ``tools/prepare_data.py`` is the command line of both.
=======
"""Data sets that the configs run on: generated digit scenes, and COCO, CIFAR and Fashion-MNIST.

Nothing here is registered: what :mod:`mmdet_moe.datasets.digit_scenes` writes and what
:mod:`mmdet_moe.datasets.download` and :mod:`mmdet_moe.datasets.fashion_mnist` fetch have the
layouts that MMDetection's ``CocoDataset`` and MMPretrain's ``CIFAR10``, ``CIFAR100`` and
``FashionMNIST`` read. ``tools/prepare_data.py`` is the command line of all.
>>>>>>> main
"""

from mmdet_moe.datasets.cluster_patches import ClusterPatches, collate_batch

__all__ = ['ClusterPatches', 'collate_batch']
