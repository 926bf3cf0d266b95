# The dense baseline: RetinaNet-R50-FPN, 1x schedule, 8 GPUs × 2 images.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime.py',
]
