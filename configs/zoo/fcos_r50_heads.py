_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mmdet_moe::_base_/balancing/hard_relative.py',
]
# The centerness reads what cls_convs give: conv_cls stays outside.
experts = [dict(at='bbox_head.cls_convs'), dict(at='bbox_head.{reg_convs,conv_reg}')]
model = dict(type='mmdet_moe.WithExperts', of='FCOS', router=_base_.router, experts=experts)
