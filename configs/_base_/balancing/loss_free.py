# No auxiliary loss: a bias per expert steers the choice (arXiv 2408.15664).
router = dict(
    type='mmdet_moe.GAPRouter',
    constraint=dict(type='mmdet_moe.BiasBalancing', update_rate=0.001),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
]
