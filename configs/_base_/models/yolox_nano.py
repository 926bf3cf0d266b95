# YOLOX-nano, trained on COCO, to be fine-tuned: batch normalisation is a part of the convolutions,
# so that an expert does not depend on the statistics of the few images that it gets.
# `tools/prepare_data.py yolox-nano` brings the weights. Another file: `export YOLOX_NANO=FILE`.
model = dict(
    type='YOLOX',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(
        type='CSPDarknet',
        deepen_factor=0.33,
        widen_factor=0.25,
        use_depthwise=True,
        norm_cfg=None,
    ),
    neck=dict(
        type='YOLOXPAFPN',
        in_channels=[64, 128, 256],
        out_channels=64,
        num_csp_blocks=1,
        use_depthwise=True,
        norm_cfg=None,
    ),
    bbox_head=dict(
        type='YOLOXHead',
        num_classes=80,
        in_channels=64,
        feat_channels=64,
        use_depthwise=True,
        norm_cfg=None,
    ),
    train_cfg=dict(assigner=dict(type='SimOTAAssigner', center_radius=2.5)),
    test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65)),
)
load_from = '{{$YOLOX_NANO:data/yolox-nano.pth}}'
