# The single ResNet-18 to compare moe_rotate_resnet18_cifar10.py with.
_base_ = './moe_rotate_resnet18_cifar10.py'
model = dict(num_experts=1)
