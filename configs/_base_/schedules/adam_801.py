# Full-batch training of the single models of arXiv 2208.02813.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=801, val_interval=801)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-2, weight_decay=5e-4))
