# As retinanet_moe_soft_digits.py, with one decision for each cell of a 4 × 4 grid over each level.
_base_ = './retinanet_moe_soft_digits.py'
model = dict(bbox_head=dict(granularity='patch', grid_size=4, whole_maps=True))
