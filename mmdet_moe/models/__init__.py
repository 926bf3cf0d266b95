"""What plugs into MMDetection and MMPretrain: their models, with parts of them as experts."""

from mmdet_moe.models.backbones import MobileNetV2_CIFAR, MoEResNet, MoEResNet_CIFAR
from mmdet_moe.models.classifiers import ClassifierMixture
from mmdet_moe.models.dense_heads import MoERetinaHead
from mmdet_moe.models.frozen import frozen
from mmdet_moe.models.necks import MoEFPN
from mmdet_moe.models.roi_heads import MoEShared2FCBBoxHead

__all__ = [
    'ClassifierMixture',
    'MoEFPN',
    'MoEResNet',
    'MoEResNet_CIFAR',
    'MoERetinaHead',
    'MoEShared2FCBBoxHead',
    'MobileNetV2_CIFAR',
    'frozen',
]
