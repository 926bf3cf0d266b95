from mmdet_moe.moe.experts.base import Experts, StackedExperts
from mmdet_moe.moe.experts.modules import ModuleExperts, independent_copies
from mmdet_moe.moe.experts.upcycling import upcycle

__all__ = [
    'Experts',
    'ModuleExperts',
    'StackedExperts',
    'independent_copies',
    'upcycle',
]
