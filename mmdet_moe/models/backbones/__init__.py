from mmdet_moe.models.backbones.moe_resnet import MoEResNet

__all__ = ['MoEResNet']
