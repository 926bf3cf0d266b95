# Feature MoE (arXiv 2204.10598): backbone stage 4 becomes 4 experts that start as copies of the
# pretrained stage; KL loss with weight 0.25.
_base_ = [
    './retinanet_dense_coco.py',
    './_base_/balancing/soft_kl.py',
]
model = dict(
    backbone=dict(
        type='mmdet_moe.MoEResNet',
        moe_stages=(4,),
        num_experts=4,
        top_k=2,
        router={{_base_.router}},
    )
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(
        type='mmdet_moe.BalancingLossHook',
        loss=dict(type='mmdet_moe.KLLoss', weight=0.25),
    ),
]
