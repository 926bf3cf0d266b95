# Digits and clothes in one detector, from scratch: two experts of each subnet for either data set.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/two_scenes.py',
    '../_base_/schedules/demo_pretrain.py',
    '../_base_/balancing/damex.py',
]
model = dict(
    bbox_head=dict(
        type='mmdet_moe.MoERetinaHead',
        num_classes=20,
        num_experts=4,
        top_k=2,
        router={{_base_.router}},
    )
)
