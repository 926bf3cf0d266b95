"""What trains and watches MoE layers under MMEngine's Runner: hooks and metrics."""

from mmdet_moe.engine.hooks import (
    BalancingLossHook,
    ExpertParallelHook,
    ExpertUtilizationHook,
)

__all__ = [
    'BalancingLossHook',
    'ExpertParallelHook',
    'ExpertUtilizationHook',
]
