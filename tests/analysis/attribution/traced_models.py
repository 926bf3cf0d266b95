"""Models with experts, by name."""

from tiny_models import FOUR, MOE_BACKBONE, MOE_NECK, build_faster, build_single

#: With random weights one level would win everywhere.
FROM_ALL_LEVELS = {
    'nms_pre': 8,
    'max_per_img': 60,
    'nms': {'type': 'nms', 'iou_threshold': 0.95},
}
MODELS = {
    'moe retina': lambda: build_single('moe retina'),
    'retina, neck': lambda: build_single('retina', neck=MOE_NECK),
    'retina, backbone': lambda: build_single('retina', MOE_BACKBONE),
    'moe retina, neck, backbone': lambda: build_single('moe retina', MOE_BACKBONE, MOE_NECK),
    'fcos, neck': lambda: build_single('fcos', neck=MOE_NECK),
    'atss, neck': lambda: build_single('atss', neck=MOE_NECK),
    **{
        f'{head}, neck': lambda head=head: build_single(head, neck=MOE_NECK)
        for head in ('gfl', 'yolox')
    },
    **{
        f'{head}, neck': lambda head=head: build_single(head, neck=MOE_NECK, **FROM_ALL_LEVELS)
        for head in ('tood', 'rtmdet', 'rtmdet, objectness', 'ssd')
    },
    'yolov3, neck': lambda: build_single('yolov3', neck=MOE_NECK, train_cfg=False),
    'faster': lambda: build_faster(FOUR),
    'faster, dense head': lambda: build_faster(neck=MOE_NECK),
    'faster, agnostic': lambda: build_faster(FOUR, reg_class_agnostic=True),
}
