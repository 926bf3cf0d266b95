# The cluster-structured data of arXiv 2208.02813, setting 1, generated in memory: one batch has
# all, and a step takes milliseconds. In MMPretrain.
custom_imports = dict(imports=['projects.cluster_theory'])
default_scope = 'mmpretrain'
model = dict(type='mmdet_moe.PatchMixture', in_channels=50, num_classes=2, activation='cubic')
train_dataloader = dict(
    batch_size=16000,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    collate_fn=dict(type='mmdet_moe.collate_batch'),
    dataset=dict(type='mmdet_moe.ClusterPatches', setting='s1', split='train', num_samples=16000),
)
val_dataloader = test_dataloader = dict(
    batch_size=16000,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='mmdet_moe.collate_batch'),
    dataset=dict(type='mmdet_moe.ClusterPatches', setting='s1', split='test', num_samples=16000),
)
val_evaluator = test_evaluator = [dict(type='Accuracy'), dict(type='mmdet_moe.DispatchEntropy')]
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(window_size=50, by_epoch=False)
log_level = 'INFO'
randomness = dict(seed=0)
