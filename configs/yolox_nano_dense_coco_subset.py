# The dense baseline of yolox_nano_moe_*_coco_subset.py, which costs what each of them does.
_base_ = [
    './_base_/models/yolox_nano.py',
    './_base_/datasets/coco_subset.py',
    './_base_/schedules/yolox_adamw.py',
    './_base_/default_runtime.py',
]
