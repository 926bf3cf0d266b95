# The single ResNet-18 to compare moe_rotate_resnet18_fashion_mnist.py with.
_base_ = './moe_rotate_resnet18_fashion_mnist.py'
model = dict(num_experts=1)
