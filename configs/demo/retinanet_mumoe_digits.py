# The 1×1 convolutions with which the neck begins become μMoEs of 16 experts (arXiv 2402.12550), one
# decision per pixel. They start anew; all else is the pretrained RetinaNet.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/demo.py',
]
model = dict(
    type='mmdet_moe.WithExperts',
    of='RetinaNet',
    experts=[dict(at='neck.lateral_convs.*', type='mmdet_moe.CPMuMoE', num_experts=16)],
)
