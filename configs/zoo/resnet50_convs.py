_base_ = [
    'mmpretrain::resnet/resnet50_8xb32_in1k.py',
    'mmdet_moe::_base_/balancing/soft_kl.py',
]
experts = [dict(at='backbone.layer4', every='Conv2d')]
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier', router=_base_.router, experts=experts
)
