# Setting 4 of arXiv 2208.02813: the mixture of non-linear experts.
_base_ = [
    './_base_/models/patch_mixture.py',
    './_base_/datasets/cluster_patches_s4.py',
    './_base_/schedules/normalized_gd.py',
    './_base_/theory_runtime.py',
]
