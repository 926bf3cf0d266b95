# The recipe of cifar_adam.py, a sixth as long.
_base_ = './cifar_adam.py'
train_cfg = dict(max_epochs=30)
param_scheduler = dict(milestones=[17, 25])
