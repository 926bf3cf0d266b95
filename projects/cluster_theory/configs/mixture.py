# The mixture of arXiv 2208.02813: 8 experts, top-1, each a two-layer CNN with 8 filters per class.
_base_ = './_base_/clusters.py'
model = dict(
    num_experts=8,
    top_k=1,
    num_filters=8,
    init_scale=1e-3,
    router=dict(type='mmdet_moe.PatchRouter', gate='logit', noise='uniform'),
    loss_on='probabilities',
)
# Full-batch training: every expert makes steps of the same length, the router is trained by plain
# gradient descent. The authors' loop makes 501 steps.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=501, val_interval=501)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmdet_moe.ExpertGroupsConstructor',
    optimizer=dict(type='mmdet_moe.NormalizedGD', lr=1e-3),
    paramwise_cfg=dict(others=dict(lr=0.1, normalize=False)),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook', draw=False),
    # As the authors' loop does.
    dict(type='mmdet_moe.StopAtLossHook', threshold=0.314, rise=0.02, key='loss_cls'),
    dict(type='mmdet_moe.ClusterAlignmentHook', interval=10),
    # The paper's load-balancing loss. Its table was made without, and so training warns.
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.SwitchLoss', weight=0.0)),
]
