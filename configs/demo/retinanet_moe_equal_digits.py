# The same with narrow experts, two of which cost what one dense subnet does. Each starts with a
# part of the dense channels.
_base_ = './retinanet_moe_soft_digits.py'
model = dict(bbox_head=dict(width='equal'))
