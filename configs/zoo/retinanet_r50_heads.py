_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet_moe::_base_/balancing/soft_importance.py',
]
subnets = ['bbox_head.{cls_convs,retina_cls}', 'bbox_head.{reg_convs,retina_reg}']
experts = [dict(at=subnet, num_experts=4, top_k=2) for subnet in subnets]
model = dict(type='mmdet_moe.WithExperts', of='RetinaNet', router=_base_.router, experts=experts)
