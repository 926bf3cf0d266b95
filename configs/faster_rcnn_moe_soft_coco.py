# RoI MoE: the two shared layers of the box head become 4 experts, chosen for each RoI; balanced by
# the importance loss.
_base_ = [
    './_base_/models/faster_rcnn_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime.py',
    './_base_/balancing/soft_importance.py',
]
model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='mmdet_moe.MoEShared2FCBBoxHead',
            num_experts=4,
            top_k=2,
            router={{_base_.router}},
        )
    )
)
optim_wrapper = dict(optimizer=dict(lr=0.02))
