# The dense baseline of mlp_mixer_mumoe_fashion_mnist.py.
_base_ = [
    './_base_/models/mlp_mixer_fashion_mnist.py',
    './_base_/datasets/fashion_mnist.py',
    './_base_/schedules/fashion_mnist_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
