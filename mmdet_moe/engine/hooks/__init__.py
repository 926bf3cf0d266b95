from mmdet_moe.engine.hooks.balancing_loss_hook import BalancingLossHook
from mmdet_moe.engine.hooks.expert_parallel_hook import ExpertParallelHook
from mmdet_moe.engine.hooks.expert_utilization_hook import ExpertUtilizationHook

__all__ = [
    'BalancingLossHook',
    'ExpertParallelHook',
    'ExpertUtilizationHook',
]
