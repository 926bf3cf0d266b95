# The information between item and expert within each pyramid level: balanced on average, sharp for
# every single item. Routers see each level normalised (of a FPN with 5 levels), without noise.
router = dict(type='mmdet_moe.GAPRouter', normalise_levels=5, noise=False)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(
        type='mmdet_moe.BalancingLossHook',
        loss=[
            dict(type='mmdet_moe.EntropyLoss', weight=0.5, over='batch', within='level'),
            dict(type='mmdet_moe.EntropyLoss', weight=0.25, over='item'),
        ],
    ),
]
