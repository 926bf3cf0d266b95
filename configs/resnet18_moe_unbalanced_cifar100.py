# Stage 4 of a ResNet-18 becomes 4 narrow experts (arXiv 2204.10598) on CIFAR-100;
# without any balancing.
_base_ = [
    './resnet18_moe_dense_cifar100.py',
    './_base_/balancing/none.py',
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
