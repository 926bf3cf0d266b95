# The common start of the models on fashion scenes: the dense RetinaNet from scratch.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/fashion_scenes.py',
    '../_base_/schedules/demo_pretrain.py',
]
