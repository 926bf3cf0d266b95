# Neck MoE: every FPN output convolution becomes 4 experts, chosen for each cell of a 4×4 grid.
_base_ = [
    './retinanet_dense_coco.py',
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
