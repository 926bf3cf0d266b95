# As retinanet_moe_soft_digits.py; experts above their share of importance are masked.
_base_ = [
    './retinanet_dense_digits.py',
    '../_base_/balancing/hard_relative.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
