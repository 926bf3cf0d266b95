# Soft, for data that are several data sets (mmdet_moe.JointDataset): cross-entropy of the router's
# probabilities against the data set of the image, among which the experts are divided evenly (DAMEX,
# arXiv 2311.04894).
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(
        type='mmdet_moe.BalancingLossHook',
        loss=dict(type='mmdet_moe.DatasetLoss', weight=0.1, sources=2),
    ),
]
