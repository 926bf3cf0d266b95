# Neck MoE: every FPN output convolution becomes 4 experts, chosen for each cell of a 4×4 grid.
_base_ = [
    './_base_/models/retinanet_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime.py',
    './_base_/balancing/soft_importance.py',
]
model = dict(
    neck=dict(
        type='mmdet_moe.MoEFPN',
        num_experts=4,
        top_k=2,
        router={{_base_.router}},
        granularity='patch',
        grid_size=4,
    )
)
