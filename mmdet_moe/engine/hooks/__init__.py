from mmdet_moe.engine.hooks.balancing_loss_hook import BalancingLossHook
from mmdet_moe.engine.hooks.cluster_alignment_hook import ClusterAlignmentHook
from mmdet_moe.engine.hooks.expert_utilization_hook import ExpertUtilizationHook
from mmdet_moe.engine.hooks.stop_at_loss_hook import StopAtLossHook

__all__ = [
    'BalancingLossHook',
    'ClusterAlignmentHook',
    'ExpertUtilizationHook',
    'StopAtLossHook',
]
