_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mmdet_moe::_base_/balancing/loss_free.py',
]
# One decision for each query; all queries pass the shared expert.
experts = [dict(at='decoder.layers.*.ffn.layers', granularity='token', num_experts=8, shared=1)]
model = dict(type='mmdet_moe.WithExperts', of='DINO', router=_base_.router, experts=experts)
