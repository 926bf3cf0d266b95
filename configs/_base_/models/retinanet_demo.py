# A RetinaNet that trains from scratch on two CPU cores in minutes: half-width ResNet-18, 64-channel
# FPN and head with 2 stacked convolutions. The head has group norm, which does not depend on how
# many items an expert gets.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        norm_cfg=dict(type='GN', num_groups=16, requires_grad=True),
        loss_cls=dict(alpha=0.5),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=50),
)
