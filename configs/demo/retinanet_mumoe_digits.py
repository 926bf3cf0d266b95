# The 1×1 convolutions with which the neck begins become μMoEs of 16 experts (arXiv 2402.12550), one
# decision per pixel. They start anew; all else is the pretrained RetinaNet.
_base_ = './retinanet_dense_digits.py'
model = dict(
    type='mmdet_moe.WithExperts',
    of='RetinaNet',
    experts=[dict(at='neck.lateral_convs.*', type='mmdet_moe.CPMuMoE', num_experts=16)],
)
