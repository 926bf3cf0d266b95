# Experts in the neck alone.
_base_ = './yolox_nano_moe_all_coco_subset.py'
model = dict(experts=_base_.neck_experts)
