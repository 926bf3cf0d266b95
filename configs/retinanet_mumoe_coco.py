# The 1×1 convolutions with which the neck begins become μMoEs of 64 experts (arXiv 2402.12550), one
# decision per pixel, with no more parameters than the convolutions have.
_base_ = [
    './_base_/models/retinanet_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime.py',
]
model = dict(
    type='mmdet_moe.WithExperts',
    of='RetinaNet',
    experts=[dict(at='neck.lateral_convs.*', type='mmdet_moe.CPMuMoE', num_experts=64)],
)
