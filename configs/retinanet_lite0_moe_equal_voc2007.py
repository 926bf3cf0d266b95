# As retinanet_lite0_moe_soft_voc2007.py with narrow experts, two of which cost what one dense
# subnet does.
_base_ = './retinanet_lite0_moe_soft_voc2007.py'
model = dict(bbox_head=dict(width='equal'))
