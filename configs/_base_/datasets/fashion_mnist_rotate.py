# The task of cifar10_rotate.py on Fashion-MNIST, unpacked by `tools/prepare_data.py fashion-mnist`.
# Another folder: `export FASHION_MNIST_ROOT=DIR`, or `--cfg-options data_root=DIR`.
dataset_type = 'FashionMNIST'
data_root = '{{$FASHION_MNIST_ROOT:data/fashion-mnist}}'
data_preprocessor = dict(num_classes=2, mean=[107.58], std=[90.04])  # of the squares shown
pack = [dict(type='PackInputs', algorithm_keys=('cluster',))]
train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmdet_moe.RotatedPairs',
        angle=30,
        dataset=dict(
            type=dataset_type,
            data_root=data_root,
            split='train',
            download=False,
            # Before the rotation: a flip after it would turn the image the other way round.
            pipeline=[dict(type='RandomFlip', prob=0.5, direction='horizontal')],
        ),
        pipeline=pack,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmdet_moe.RotatedPairs',
        angle=30,
        dataset=dict(
            type=dataset_type,
            data_root=data_root,
            split='test',
            test_mode=True,  # by which this class goes
            download=False,
            pipeline=[],
        ),
        pipeline=pack,
    ),
)
val_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='mmdet_moe.DispatchEntropy')]
test_dataloader = val_dataloader
test_evaluator = val_evaluator
