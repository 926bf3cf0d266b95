# RoI MoE: the two shared layers of the box head become 4 experts, chosen for each RoI; balanced by
# the importance loss.
_base_ = [
    './faster_rcnn_dense_coco.py',
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
