# The recipe of arXiv 2204.10598: Adam, the rate divided by 10 at epochs 100 and 150. The paper
# averages over 3 seeds (`--cfg-options randomness.seed=0`, then 1 and 2).
train_cfg = dict(by_epoch=True, max_epochs=180, val_interval=1)
val_cfg = dict()
test_cfg = dict()
classification_loss = dict(type='CrossEntropyLoss')
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[100, 150], gamma=0.1)
auto_scale_lr = dict(base_batch_size=128)
