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
        softmax='none',
    ),
    loss_on='probabilities',
)
# Nothing balances the experts: the paper's table was made without, and training warns about it.
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook', draw=False),
    dict(type='mmdet_moe.StopAtLossHook', threshold=0.314, key='loss_cls'),
    dict(type='mmdet_moe.ClusterAlignmentHook', interval=10),
]
