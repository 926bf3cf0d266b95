# As retinanet_moe_soft_digits.py, with one decision for each pixel of each level, the place of its
# anchors.
_base_ = './retinanet_moe_soft_digits.py'
model = dict(bbox_head=dict(granularity='pixel', whole_maps=True))
