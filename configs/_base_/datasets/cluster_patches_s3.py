# Setting 3: a weaker misleading feature.
_base_ = './cluster_patches_s1.py'
train_dataloader = dict(dataset=dict(setting='s3'))
val_dataloader = dict(dataset=dict(setting='s3'))
test_dataloader = dict(dataset=dict(setting='s3'))
