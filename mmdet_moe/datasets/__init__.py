"""Data sets that the configs run on: generated digit scenes, and COCO, CIFAR and Fashion-MNIST.

Nothing here is registered: what :mod:`mmdet_moe.datasets.digit_scenes` writes and what
:mod:`mmdet_moe.datasets.download` and :mod:`mmdet_moe.datasets.fashion_mnist` fetch have the
layouts that MMDetection's ``CocoDataset`` and MMPretrain's ``CIFAR10``, ``CIFAR100`` and
``FashionMNIST`` read. ``tools/prepare_data.py`` is the command line of all.
"""
