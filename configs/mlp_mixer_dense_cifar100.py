# The dense baseline of mlp_mixer_mumoe_cifar100.py.
_base_ = [
    './_base_/models/mlp_mixer_cifar.py',
    './_base_/datasets/cifar100.py',
    './_base_/schedules/cifar_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
