_base_ = [
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'mmdet_moe::_base_/balancing/soft_importance.py',
]
experts = [dict(at='*coder.layers.*.ffn.layers', granularity='token', width='equal')]
model = dict(
    type='mmdet_moe.WithExperts', of='DeformableDETR', router=_base_.router, experts=experts
)
