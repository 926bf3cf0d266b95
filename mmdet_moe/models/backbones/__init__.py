from mmdet_moe.models.backbones.mobilenet_v2_cifar import MobileNetV2_CIFAR
from mmdet_moe.models.backbones.moe_resnet_cifar import MoEResNet_CIFAR

__all__ = ['MoEResNet_CIFAR', 'MobileNetV2_CIFAR']
