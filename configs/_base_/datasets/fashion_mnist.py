# Fashion-MNIST, unpacked by `tools/prepare_data.py fashion-mnist`. Another folder:
# `export FASHION_MNIST_ROOT=DIR`, or `--cfg-options data_root=DIR`.
dataset_type = 'FashionMNIST'
data_root = '{{$FASHION_MNIST_ROOT:data/fashion-mnist}}'
data_preprocessor = dict(num_classes=10, mean=[72.94], std=[90.02])
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
            dict(type='RandomCrop', crop_size=28, padding=2),
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
        test_mode=True,  # by which this class goes
        download=False,
        pipeline=[dict(type='PackInputs')],
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
