# As retinanet_moe_hard_digits.py, on fashion scenes.
_base_ = [
    './retinanet_dense_fashion.py',
    '../_base_/balancing/hard_relative.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
