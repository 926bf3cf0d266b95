# Both subnets of the head become 4 experts, balanced by the importance loss.
_base_ = [
    './retinanet_lite0_dense_voc2007.py',
    './_base_/balancing/soft_importance.py',
]
model = dict(
    bbox_head=dict(type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}})
)
