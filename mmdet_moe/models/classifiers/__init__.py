from mmdet_moe.models.classifiers.classifier_mixture import ClassifierMixture

__all__ = ['ClassifierMixture']
