# The dense baseline of resnet18_moe_*_fashion_mnist.py.
_base_ = [
    './_base_/models/resnet18_fashion_mnist.py',
    './_base_/datasets/fashion_mnist.py',
    './_base_/schedules/fashion_mnist_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
