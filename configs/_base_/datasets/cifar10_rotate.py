# CIFAR-10-Rotate (arXiv 2208.02813): is this image rotated by 30 degrees? The ten classes are
# hidden clusters. CIFAR-10 in its published form (`tools/prepare_data.py cifar10` downloads it);
# another folder: `export CIFAR10_ROOT=DIR`, or `--cfg-options data_root=DIR`.
dataset_type = 'mmdet_moe.CIFAR10'
data_root = '{{$CIFAR10_ROOT:data/cifar10}}'
data_preprocessor = dict(
    num_classes=2,
    mean=[125.307, 122.961, 113.858],  # of the training images, which are RGB already
    std=[62.993, 62.089, 66.705],
    to_rgb=False,
)
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
            test_mode=True,
            download=False,
            pipeline=[],
        ),
        pipeline=pack,
    ),
)
val_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='mmdet_moe.DispatchEntropy')]
test_dataloader = val_dataloader
test_evaluator = val_evaluator
