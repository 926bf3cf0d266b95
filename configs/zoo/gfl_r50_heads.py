_base_ = [
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    'mmdet_moe::_base_/balancing/soft_importance.py',
]
subnets = ['bbox_head.{cls_convs,gfl_cls}', 'bbox_head.{reg_convs,gfl_reg}']
experts = [dict(at=subnet, width='equal') for subnet in subnets]
model = dict(type='mmdet_moe.WithExperts', of='GFL', router=_base_.router, experts=experts)
