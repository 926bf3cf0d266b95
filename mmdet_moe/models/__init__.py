"""What plugs into MMDetection and MMPretrain: models with mixtures of experts in them."""

from mmdet_moe.models.backbones import MoEResNet
from mmdet_moe.models.classifiers import PatchMixture
from mmdet_moe.models.dense_heads import MoERetinaHead
from mmdet_moe.models.frozen import frozen
from mmdet_moe.models.necks import MoEFPN
from mmdet_moe.models.roi_heads import MoEShared2FCBBoxHead

__all__ = [
    'MoEFPN',
    'MoEResNet',
    'MoERetinaHead',
    'MoEShared2FCBBoxHead',
    'PatchMixture',
    'frozen',
]
