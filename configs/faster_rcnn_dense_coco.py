# The dense two-stage baseline: Faster R-CNN-R50-FPN, 1x schedule, 8 GPUs × 2 images.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime.py',
]
optim_wrapper = dict(optimizer=dict(lr=0.02))
