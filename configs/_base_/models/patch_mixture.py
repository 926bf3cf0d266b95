# The mixture of arXiv 2208.02813: 8 experts, top-1, each a two-layer CNN with 8 filters per class.
model = dict(
    type='mmdet_moe.PatchMixture',
    in_channels=50,
    num_classes=2,
    num_experts=8,
    top_k=1,
    num_filters=8,
    activation='cubic',
    init_scale=1e-3,
    router=dict(
        type='mmdet_moe.GAPRouter',
        pool='sum',
        bias=False,
        init_std=0.0,
        noise='uniform',
        softmax='raw',
    ),
    loss_on='probabilities',
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook', draw=False),
    # As the authors' loop does.
    dict(type='mmdet_moe.StopAtLossHook', threshold=0.314, rise=0.02, key='loss_cls'),
    dict(type='mmdet_moe.ClusterAlignmentHook', interval=10),
    # The paper's load-balancing loss. Its table was made without, and so training warns.
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.SwitchLoss', weight=0.0)),
]
