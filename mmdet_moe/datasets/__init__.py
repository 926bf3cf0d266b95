"""Data sets that the configs run on: generated digit scenes, and downloads of COCO and CIFAR-100.

Nothing here is registered: what :mod:`mmdet_moe.datasets.digit_scenes` writes and what
:mod:`mmdet_moe.datasets.download` unpacks have the layouts that MMDetection's ``CocoDataset`` and
MMPretrain's ``CIFAR100`` read. ``tools/prepare_data.py`` is the command line of both.
"""
