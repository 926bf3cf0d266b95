# The linear layer of a ResNet-18 becomes a μMoE of 16 experts (arXiv 2402.12550) on CIFAR-100.
_base_ = './resnet18_moe_dense_cifar100.py'
model = dict(
    head=dict(
        type='mmdet_moe.MuMoEClsHead',
        num_experts=16,  # or levels of them, such as (8, 8)
        rank='match',  # no more parameters than the linear layer has
    )
)
