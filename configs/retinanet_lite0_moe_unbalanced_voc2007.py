# As retinanet_lite0_moe_soft_voc2007.py, without any balancing.
_base_ = [
    './retinanet_lite0_dense_voc2007.py',
    './_base_/balancing/none.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
