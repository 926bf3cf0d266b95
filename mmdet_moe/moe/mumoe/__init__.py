"""Multilinear mixtures of experts (arXiv 2402.12550): thousands of experts in factorised form."""

from mmdet_moe.moe.mumoe.factors import CPFactors, Factors, TRFactors
from mmdet_moe.moe.mumoe.gate import ExpertGate
from mmdet_moe.moe.mumoe.layers import CPMuMoE, MuMoE, MuMoEConv1x1, MuMoEMLP, TRMuMoE

__all__ = [
    'CPFactors',
    'CPMuMoE',
    'ExpertGate',
    'Factors',
    'MuMoE',
    'MuMoEConv1x1',
    'MuMoEMLP',
    'TRFactors',
    'TRMuMoE',
]
