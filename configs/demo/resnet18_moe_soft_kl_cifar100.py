# As ../resnet18_moe_soft_kl_cifar100.py with an eighth of the width (8 to 64 channels), 25 epochs
# instead of 180, experts so wide that two cost what the dense stage does, and mixed precision.
# `tools/look.py cifar100` shows what its experts learned, with the weights that the package ships;
# half an hour on one CPU core trains it anew.
_base_ = '../resnet18_moe_soft_kl_cifar100.py'
model = dict(
    backbone=dict(stem_channels=8, base_channels=8, expert_channels='equal_flops'),
    head=dict(in_channels=64),
)
train_cfg = dict(max_epochs=25, val_interval=25)
param_scheduler = dict(milestones=[14, 21])
optim_wrapper = dict(type='AmpOptimWrapper')
