# The same for grey images of 10 classes.
_base_ = './resnet18_cifar.py'
model = dict(backbone=dict(in_channels=1), head=dict(num_classes=10))
