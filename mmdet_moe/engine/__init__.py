"""What trains and watches MoE layers under MMEngine's Runner: hooks, optimizers and metrics."""

from mmdet_moe.engine.hooks import (
    BalancingLossHook,
    ClusterAlignmentHook,
    ExpertUtilizationHook,
    StopAtLossHook,
)

__all__ = [
    'BalancingLossHook',
    'ClusterAlignmentHook',
    'ExpertUtilizationHook',
    'StopAtLossHook',
]
