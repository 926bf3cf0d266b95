"""The core: mixture-of-experts layers in plain PyTorch, usable in any program."""

from mmdet_moe.moe.constraints import (
    BiasBalancing,
    Constraint,
    MeanImportanceConstraint,
    RelativeImportanceConstraint,
)
from mmdet_moe.moe.editing import Edit, apply_edits, edit_experts
from mmdet_moe.moe.expert_layer import ExpertLayer, find_expert_layers
from mmdet_moe.moe.experts import (
    ConvExperts,
    Experts,
    LinearExperts,
    MLPExperts,
    ModuleExperts,
    StackedExperts,
    upcycle,
)
from mmdet_moe.moe.layer import (
    DECISION_WEIGHTS,
    MoELayer,
    count_parameters,
    find_moe_layers,
)
from mmdet_moe.moe.losses import (
    BalancingLoss,
    DatasetLoss,
    EntropyLoss,
    ImportanceLoss,
    KLLoss,
    RouterZLoss,
    SwitchLoss,
    VarianceLoss,
)
from mmdet_moe.moe.mumoe import CPMuMoE, MuMoE, MuMoEConv1x1, MuMoEMLP, TRMuMoE
from mmdet_moe.moe.routers import ConvGAPRouter, GAPRouter, Router
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.surgery import Report, add_experts, report_of
from mmdet_moe.moe.utilization import Utilization, UtilizationReport

__all__ = [
    'DECISION_WEIGHTS',
    'BalancingLoss',
    'BiasBalancing',
    'CPMuMoE',
    'Constraint',
    'ConvExperts',
    'ConvGAPRouter',
    'DatasetLoss',
    'Edit',
    'EntropyLoss',
    'ExpertLayer',
    'Experts',
    'GAPRouter',
    'ImportanceLoss',
    'KLLoss',
    'LinearExperts',
    'MLPExperts',
    'MeanImportanceConstraint',
    'MoELayer',
    'ModuleExperts',
    'MuMoE',
    'MuMoEConv1x1',
    'MuMoEMLP',
    'RelativeImportanceConstraint',
    'Report',
    'Router',
    'RouterZLoss',
    'Routing',
    'StackedExperts',
    'SwitchLoss',
    'TRMuMoE',
    'Utilization',
    'UtilizationReport',
    'VarianceLoss',
    'add_experts',
    'apply_edits',
    'count_parameters',
    'edit_experts',
    'find_expert_layers',
    'find_moe_layers',
    'report_of',
    'upcycle',
]
