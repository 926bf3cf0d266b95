from mmdet_moe.models.classifiers.patch_mixture import PatchMixture

__all__ = ['PatchMixture']
