# Full-batch training (arXiv 2208.02813): every expert makes steps of the same length, the router
# is trained by plain gradient descent. The authors' loop makes 501 steps.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=501, val_interval=501)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmdet_moe.ExpertGroupsConstructor',
    optimizer=dict(type='mmdet_moe.NormalizedGD', lr=1e-3),
    paramwise_cfg=dict(others=dict(lr=0.1, normalize=False)),
)
