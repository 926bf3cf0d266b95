# The linear classifier of efficientnet_lite0_mumoe_cifar100.py's features.
_base_ = [
    './_base_/models/efficientnet_lite0.py',
    './_base_/datasets/cifar100_enlarged.py',
    './_base_/schedules/head_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
