from mmdet_moe.models.classifiers.classifier_mixture import ClassifierMixture
from mmdet_moe.models.classifiers.patch_mixture import PatchMixture

__all__ = ['ClassifierMixture', 'PatchMixture']
