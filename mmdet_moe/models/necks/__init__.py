from mmdet_moe.models.necks.moe_fpn import MoEFPN

__all__ = ['MoEFPN']
