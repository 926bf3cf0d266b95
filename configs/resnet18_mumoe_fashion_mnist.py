# The linear layer of a ResNet-18 becomes a μMoE of 64 experts (arXiv 2402.12550) on Fashion-MNIST.
_base_ = [
    './_base_/models/resnet18_fashion_mnist.py',
    './_base_/datasets/fashion_mnist.py',
    './_base_/schedules/fashion_mnist_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(
    head=dict(
        type='mmdet_moe.MuMoEClsHead',
        num_experts=64,
        rank=32,  # the linear layer has fewer parameters than the gate alone
        loss={{_base_.classification_loss}},
    )
)
