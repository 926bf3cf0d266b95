# CIFAR-100 in its published form: `tools/prepare_data.py cifar100` downloads it, or makes it of a
# folder of images for each class with `--source DIR`. Another place: `export CIFAR100_ROOT=DIR`, or
# `--cfg-options data_root=DIR`.
dataset_type = 'mmdet_moe.CIFAR100'
data_root = '{{$CIFAR100_ROOT:data/cifar100}}'
data_preprocessor = dict(
    num_classes=100,
    mean=[129.304, 124.070, 112.434],  # of the training images, which are RGB already
    std=[68.170, 65.392, 70.418],
    to_rgb=False,
)
train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        split='train',
        download=False,
        pipeline=[
            dict(type='RandomCrop', crop_size=32, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        split='test',
        download=False,
        pipeline=[dict(type='PackInputs')],
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
