# Hard: hard_relative.py with the paper's threshold for classifiers, which decide once per image.
router = dict(
    type='mmdet_moe.GAPRouter',
    constraint=dict(type='mmdet_moe.RelativeImportanceConstraint', threshold=0.5),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
]
