# The dense baseline on fashion scenes: the pretrained RetinaNet, trained on as the MoE models are.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/fashion_scenes.py',
    '../_base_/schedules/demo_fashion.py',
]
