from mmdet_moe.models.backbones.moe_resnet import MoEResNet
from mmdet_moe.models.backbones.moe_resnet_cifar import MoEResNet_CIFAR

__all__ = ['MoEResNet', 'MoEResNet_CIFAR']
