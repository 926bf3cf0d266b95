# Soft: load times probability (Switch, arXiv 2101.03961).
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.SwitchLoss', weight=0.01)),
]
