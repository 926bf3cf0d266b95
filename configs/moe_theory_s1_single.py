# Setting 1 of arXiv 2208.02813: a single non-linear model.
_base_ = [
    './_base_/models/patch_single.py',
    './_base_/datasets/cluster_patches_s1.py',
    './_base_/schedules/adam_801.py',
    './_base_/theory_runtime.py',
]
