from mmdet_moe.moe.experts.base import Experts, StackedExperts
from mmdet_moe.moe.experts.conv import ConvExperts
from mmdet_moe.moe.experts.linear import LinearExperts, MLPExperts
from mmdet_moe.moe.experts.modules import ModuleExperts, independent_copies
from mmdet_moe.moe.experts.upcycling import upcycle

__all__ = [
    'ConvExperts',
    'Experts',
    'LinearExperts',
    'MLPExperts',
    'ModuleExperts',
    'StackedExperts',
    'independent_copies',
    'upcycle',
]
