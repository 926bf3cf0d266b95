# The common start of the demo's models: the dense RetinaNet from scratch.
_base_ = [
    '../_base_/demo_runtime.py',
    '../_base_/models/retinanet_demo.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/demo_pretrain.py',
]
