# Soft, for several data sets in one (mmdet_moe.JointDataset), among which the experts are divided
# evenly: cross-entropy of the router's probabilities against the image's data set (DAMEX, arXiv
# 2311.04894).
router = dict(type='mmdet_moe.GAPRouter')
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(
        type='mmdet_moe.BalancingLossHook',
        loss=dict(type='mmdet_moe.DatasetLoss', weight=0.1),
    ),
]
