"""Hooks that train and watch MoE layers under MMEngine's Runner."""

from mmdet_moe.engine.hooks import BalancingLossHook, ExpertUtilizationHook

__all__ = ['BalancingLossHook', 'ExpertUtilizationHook']
