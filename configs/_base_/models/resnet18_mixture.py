# A mixture of whole ResNet-18 for images of 32×32 pixels, one for each image (arXiv 2208.02813).
# `num_experts=1` is the single network.
model = dict(
    type='mmdet_moe.ClassifierMixture',
    num_experts=4,
    top_k=1,
    in_channels=3,
    expert=dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet_CIFAR', depth=18, in_channels=3),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=2, in_channels=512),
    ),
    router=dict(
        type='mmdet_moe.ConvGAPRouter',
        conv_channels=64,
        noise='uniform',
        softmax='over_all',
    ),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    # The usual weight of 0.01 lets one expert take everything within two epochs.
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.SwitchLoss', weight=0.2)),
]
