# For a new head on a frozen backbone.
_base_ = './cifar_adam.py'
train_cfg = dict(max_epochs=20)
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', by_epoch=True, T_max=20, convert_to_iter_based=True
)
