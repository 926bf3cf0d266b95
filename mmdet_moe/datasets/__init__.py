"""Data sets that the configs run on.

:mod:`mmdet_moe.datasets.cluster_patches` is registered and generates its samples in memory. What
:mod:`mmdet_moe.datasets.digit_scenes` writes and what :mod:`mmdet_moe.datasets.download` and
:mod:`mmdet_moe.datasets.fashion_mnist` fetch have the layouts that MMDetection's ``CocoDataset``
and MMPretrain's ``CIFAR10``, ``CIFAR100`` and ``FashionMNIST`` read; ``tools/prepare_data.py`` is
the command line of these.
"""

from mmdet_moe.datasets.cluster_patches import ClusterPatches, collate_batch

__all__ = ['ClusterPatches', 'collate_batch']
