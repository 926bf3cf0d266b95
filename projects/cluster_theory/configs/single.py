# The single model of arXiv 2208.02813: one expert with 40 filters per class, initialised as usual.
_base_ = './_base_/clusters.py'
model = dict(
    num_experts=1,
    num_filters=40,
    init_scale=1.0,
    router=dict(type='mmdet_moe.GAPRouter', noise=False),
    loss_on='logits',
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=801, val_interval=801)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-2, weight_decay=5e-4))
# Adam's loss goes up and down; the authors end the training at the first rise after 500 steps.
custom_hooks = [dict(type='mmdet_moe.StopAtLossHook', rise=0.02, begin=500, key='loss_cls')]
