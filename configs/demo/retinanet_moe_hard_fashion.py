# As retinanet_moe_hard_digits.py, on fashion scenes.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/fashion_scenes.py',
    '../_base_/schedules/demo_fashion.py',
    '../_base_/balancing/hard_relative.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
