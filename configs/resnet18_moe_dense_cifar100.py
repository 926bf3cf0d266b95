# The dense baseline of resnet18_moe_*_cifar100.py.
_base_ = [
    './_base_/models/resnet18_cifar.py',
    './_base_/datasets/cifar100.py',
    './_base_/schedules/cifar_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
