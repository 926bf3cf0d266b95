# The single MobileNetV2 to compare moe_rotate_mobilenetv2_fashion_mnist.py with.
_base_ = './moe_rotate_mobilenetv2_fashion_mnist.py'
model = dict(num_experts=1)
