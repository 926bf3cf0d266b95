"""What plugs into MMDetection and MMPretrain: their models, with parts of them as experts."""

from mmdet_moe.models.backbones import MobileNetV2_CIFAR, MoEResNet_CIFAR
from mmdet_moe.models.classifiers import ClassifierMixture, PatchMixture
from mmdet_moe.models.dense_heads import MoERetinaHead
from mmdet_moe.models.frozen import frozen
from mmdet_moe.models.presets import moe_fpn, moe_resnet
from mmdet_moe.models.roi_heads import MoEShared2FCBBoxHead
from mmdet_moe.models.with_experts import with_experts

__all__ = [
    'ClassifierMixture',
    'MoEResNet_CIFAR',
    'MoERetinaHead',
    'MoEShared2FCBBoxHead',
    'MobileNetV2_CIFAR',
    'PatchMixture',
    'frozen',
    'moe_fpn',
    'moe_resnet',
    'with_experts',
]
