# No balancing, to see what happens then. Training warns about it.
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
]
