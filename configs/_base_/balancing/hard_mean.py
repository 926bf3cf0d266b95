# Hard: experts with a large mean share of importance are masked (arXiv 2204.10598).
router = dict(
    type='mmdet_moe.GAPRouter',
    constraint=dict(type='mmdet_moe.MeanImportanceConstraint', threshold=0.3),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
]
