# From the checkpoint of demo_pretrain.py: AdamW, with a cosine from its rate down to 0.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=400, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=20, end=400, eta_min=0),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
# Another checkpoint: `export DIGITS_PRETRAINED=FILE`, or `--cfg-options load_from=FILE`.
load_from = '{{$DIGITS_PRETRAINED:work_dirs/demo/retinanet_pretrain_digits/iter_600.pth}}'
