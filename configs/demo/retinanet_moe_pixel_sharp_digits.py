# One decision for each pixel of each level: sharp ones, that use all experts within every level.
_base_ = [
    './retinanet_dense_digits.py',
    '../_base_/balancing/sharp_within_levels.py',
]
model = dict(
    bbox_head=dict(
        type='mmdet_moe.MoERetinaHead',
        num_experts=4,
        top_k=2,
        router={{_base_.router}},
        granularity='pixel',
        whole_maps=True,
    )
)
