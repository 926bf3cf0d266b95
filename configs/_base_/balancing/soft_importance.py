# Soft: squared coefficient of variation of the importance (arXiv 2204.10598).
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(
        type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.ImportanceLoss', weight=0.5)
    ),
]
