# The linear layer of a ResNet-18 becomes a μMoE of 16 experts (arXiv 2402.12550) on CIFAR-100.
_base_ = [
    './_base_/models/resnet18_cifar.py',
    './_base_/datasets/cifar100.py',
    './_base_/schedules/cifar_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(
    head=dict(
        type='mmdet_moe.MuMoEClsHead',
        num_experts=16,  # or levels of them, such as (8, 8)
        rank='match',  # no more parameters than the linear layer has
        loss={{_base_.classification_loss}},
    )
)
