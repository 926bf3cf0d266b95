_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet_moe::_base_/balancing/switch.py',
]
# One decision for each region of interest.
experts = [dict(at='roi_head.bbox_head.shared_fcs.*', granularity='token', num_experts=8)]
model = dict(type='mmdet_moe.WithExperts', of='MaskRCNN', router=_base_.router, experts=experts)
