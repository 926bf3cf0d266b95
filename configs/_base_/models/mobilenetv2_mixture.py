# The same with MobileNetV2 as experts.
_base_ = './resnet18_mixture.py'
model = dict(
    expert=dict(
        backbone=dict(_delete_=True, type='mmdet_moe.MobileNetV2_CIFAR', in_channels=3),
        head=dict(in_channels=1280),
    )
)
