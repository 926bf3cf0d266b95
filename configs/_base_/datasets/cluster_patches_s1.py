# Cluster-structured data (arXiv 2208.02813), setting 1, generated in memory; one batch has all.
train_dataloader = dict(
    batch_size=16000,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    collate_fn=dict(type='mmdet_moe.collate_batch'),
    dataset=dict(type='mmdet_moe.ClusterPatches', setting='s1', split='train', num_samples=16000),
)
val_dataloader = dict(
    batch_size=16000,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='mmdet_moe.collate_batch'),
    dataset=dict(type='mmdet_moe.ClusterPatches', setting='s1', split='test', num_samples=16000),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy'), dict(type='mmdet_moe.DispatchEntropy')]
test_evaluator = val_evaluator
