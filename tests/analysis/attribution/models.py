"""Models with experts, by name."""

from tiny_models import FOUR, MOE_BACKBONE, MOE_NECK, build_faster, build_single

#: Boxes of RTMDet with random weights overlap a lot.
LENIENT = {'type': 'nms', 'iou_threshold': 0.95}
MODELS = {
    'moe retina': lambda: build_single('moe retina'),
    'retina, neck': lambda: build_single('retina', neck=MOE_NECK),
    'retina, backbone': lambda: build_single('retina', MOE_BACKBONE),
    'moe retina, neck, backbone': lambda: build_single('moe retina', MOE_BACKBONE, MOE_NECK),
    'fcos, neck': lambda: build_single('fcos', neck=MOE_NECK),
    'atss, neck': lambda: build_single('atss', neck=MOE_NECK),
    **{
        f'{head}, neck': lambda head=head: build_single(head, neck=MOE_NECK)
        for head in ('gfl', 'tood', 'yolox', 'ssd')
    },
    **{
        f'{head}, neck': lambda head=head: build_single(head, neck=MOE_NECK, nms=LENIENT)
        for head in ('rtmdet', 'rtmdet, objectness')
    },
    'yolov3, neck': lambda: build_single('yolov3', neck=MOE_NECK, train_cfg=False),
    'faster': lambda: build_faster(FOUR),
    'faster, dense head': lambda: build_faster(neck=MOE_NECK),
    'faster, agnostic': lambda: build_faster(FOUR, reg_class_agnostic=True),
}
