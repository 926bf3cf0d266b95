"""What plugs into MMDetection and MMPretrain: their models, with parts of them as experts.

Each toolbox may be missing: asking for what needs it, by import or in a config, raises a
:class:`~mmdet_moe.errors.ConfigError` that says so.
"""

from mmdet_moe.models.frozen import frozen
from mmdet_moe.models.presets import moe_fpn, moe_resnet, mumoe_cls_head, mumoe_mlp_mixer
from mmdet_moe.models.toolboxes import get_missing, needs
from mmdet_moe.models.with_experts import with_experts

__getattr__ = get_missing

with needs('mmdet', 'MoERetinaHead', 'MoEShared2FCBBoxHead'):
    from mmdet_moe.models.dense_heads.moe_retina_head import MoERetinaHead
    from mmdet_moe.models.roi_heads.moe_bbox_head import MoEShared2FCBBoxHead
with needs(
    'mmpretrain', 'ClassifierMixture', 'EfficientNetLite0', 'MobileNetV2_CIFAR', 'MoEResNet_CIFAR'
):
    from mmdet_moe.models.backbones.efficientnet_lite import EfficientNetLite0
    from mmdet_moe.models.backbones.mobilenet_v2_cifar import MobileNetV2_CIFAR
    from mmdet_moe.models.backbones.moe_resnet_cifar import MoEResNet_CIFAR
    from mmdet_moe.models.classifiers.classifier_mixture import ClassifierMixture

__all__ = [
    'ClassifierMixture',
    'EfficientNetLite0',
    'MoEResNet_CIFAR',
    'MoERetinaHead',
    'MoEShared2FCBBoxHead',
    'MobileNetV2_CIFAR',
    'frozen',
    'moe_fpn',
    'moe_resnet',
    'mumoe_cls_head',
    'mumoe_mlp_mixer',
    'with_experts',
]
