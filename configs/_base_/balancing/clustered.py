# For inputs of unlike kinds: the router starts with the clusters of its first inputs, so that each
# expert learns from one kind from the start on, and the chosen experts count in full. Kept in
# balance by load times probability (Switch, arXiv 2101.03961). Needs scikit-learn.
router = dict(type='mmdet_moe.GAPRouter', init='kmeans', noise=False, softmax='straight_through')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.SwitchLoss', weight=0.01)),
]
