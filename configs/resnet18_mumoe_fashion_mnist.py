# The linear layer of a ResNet-18 becomes a μMoE of 64 experts (arXiv 2402.12550) on Fashion-MNIST.
_base_ = './resnet18_moe_dense_fashion_mnist.py'
model = dict(
    head=dict(
        type='mmdet_moe.MuMoEClsHead',
        num_experts=64,
        rank=32,  # the linear layer has fewer parameters than the gate alone
    )
)
