# A modern recipe: SGD with Nesterov momentum and weight decay, a cosine after a short warm-up, and
# label smoothing.
train_cfg = dict(by_epoch=True, max_epochs=180, val_interval=1)
val_cfg = dict()
test_cfg = dict()
classification_loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, end=180, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=128)
