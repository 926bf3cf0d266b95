from mmdet_moe.models.roi_heads.moe_bbox_head import MoEShared2FCBBoxHead

__all__ = ['MoEShared2FCBBoxHead']
