# As resnet18_moe_dense_cifar100.py, with a modern recipe.
_base_ = [
    './_base_/models/resnet18_cifar.py',
    './_base_/datasets/cifar100.py',
    './_base_/schedules/cifar_sgd.py',
    './_base_/classification_runtime.py',
]
model = dict(head=dict(loss={{_base_.classification_loss}}))
