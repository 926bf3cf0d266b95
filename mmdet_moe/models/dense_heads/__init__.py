from mmdet_moe.models.dense_heads.moe_retina_head import MoERetinaHead

__all__ = ['MoERetinaHead']
