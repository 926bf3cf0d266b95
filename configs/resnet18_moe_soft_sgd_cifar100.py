# As resnet18_moe_soft_cifar100.py, with a modern recipe.
_base_ = [
    './resnet18_moe_dense_sgd_cifar100.py',
    './_base_/balancing/soft_importance.py',
]
model = dict(
    backbone=dict(
        type='mmdet_moe.MoEResNet_CIFAR',
        moe_stages=4,  # 1 to 4, or 0 for the first convolution
        num_experts=4,
        top_k=2,
        expert_channels=(25, 50, 90, 180),  # of stages 1 to 4: two experts cost what the stage does
        router={{_base_.router}},
    ),
)
