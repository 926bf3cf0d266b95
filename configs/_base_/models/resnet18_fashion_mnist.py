# The same for grey images of 10 classes; depth 50 takes head.in_channels=2048 here, too.
_base_ = './resnet18_cifar.py'
model = dict(backbone=dict(in_channels=1), head=dict(num_classes=10))
