# The single MobileNetV2 to compare moe_rotate_mobilenetv2_cifar10.py with.
_base_ = './moe_rotate_mobilenetv2_cifar10.py'
model = dict(num_experts=1)
