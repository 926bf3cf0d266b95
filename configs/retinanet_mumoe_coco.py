# The 1×1 convolutions with which the neck begins become μMoEs of 64 experts (arXiv 2402.12550), one
# decision per pixel, with no more parameters than the convolutions have.
_base_ = './retinanet_dense_coco.py'
model = dict(
    type='mmdet_moe.WithExperts',
    of='RetinaNet',
    experts=[dict(at='neck.lateral_convs.*', type='mmdet_moe.CPMuMoE', num_experts=64)],
)
