# Soft: KL divergence of the shares of importance from uniform (arXiv 2204.10598).
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.KLLoss', weight=0.5)),
]
