# Rotated or not, on Fashion-MNIST (arXiv 2208.02813): a mixture of 4 whole MobileNetV2.
_base_ = [
    './_base_/models/mobilenetv2_mixture.py',
    './_base_/datasets/fashion_mnist_rotate.py',
    './_base_/schedules/rotate_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(in_channels=1, expert=dict(backbone=dict(in_channels=1)))
