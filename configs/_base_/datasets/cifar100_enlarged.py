# CIFAR-100 at 96×96 pixels, for backbones that were trained on larger images.
_base_ = './cifar100.py'
enlarge = dict(type='Resize', scale=96, interpolation='bicubic')
data_preprocessor = dict(mean=[127.0, 127.0, 127.0], std=[128.0, 128.0, 128.0])
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            enlarge,
            dict(type='PackInputs'),
        ]
    )
)
val_dataloader = dict(dataset=dict(pipeline=[enlarge, dict(type='PackInputs')]))
test_dataloader = val_dataloader
