_base_ = [
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmdet_moe::_base_/balancing/switch.py',
]
experts = [dict(at='backbone.stages.*.blocks.*.ffn.layers', granularity='token', num_experts=8)]
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier', router=_base_.router, experts=experts
)
