from mmdet_moe.engine.optimizers.expert_groups import ExpertGroupsConstructor
from mmdet_moe.engine.optimizers.normalized_gd import NormalizedGD

__all__ = ['ExpertGroupsConstructor', 'NormalizedGD']
