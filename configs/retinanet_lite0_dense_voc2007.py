# The dense baseline of retinanet_lite0_moe_*_voc2007.py.
_base_ = [
    './_base_/models/retinanet_lite0.py',
    './_base_/datasets/voc2007.py',
    './_base_/schedules/voc_adamw.py',
    './_base_/default_runtime.py',
]
