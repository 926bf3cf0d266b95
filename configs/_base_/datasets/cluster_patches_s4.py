# Setting 4: twice the noise, a weaker misleading feature.
_base_ = './cluster_patches_s1.py'
train_dataloader = dict(dataset=dict(setting='s4'))
val_dataloader = dict(dataset=dict(setting='s4'))
test_dataloader = dict(dataset=dict(setting='s4'))
