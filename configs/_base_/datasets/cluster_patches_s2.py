# Setting 2: twice the noise.
_base_ = './cluster_patches_s1.py'
train_dataloader = dict(dataset=dict(setting='s2'))
val_dataloader = dict(dataset=dict(setting='s2'))
test_dataloader = dict(dataset=dict(setting='s2'))
