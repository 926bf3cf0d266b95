# The task of cifar10_rotate.py on Fashion-MNIST, unpacked by `tools/prepare_data.py fashion-mnist`.
# Another folder: `export FASHION_MNIST_ROOT=DIR`, or `--cfg-options data_root=DIR`.
_base_ = './cifar10_rotate.py'
dataset_type = 'FashionMNIST'
data_root = '{{$FASHION_MNIST_ROOT:data/fashion-mnist}}'
data_preprocessor = dict(
    _delete_=True,
    num_classes=2,
    mean=[107.58],  # of the squares shown
    std=[90.04],
)
train_dataloader = dict(dataset=dict(dataset=dict(type=dataset_type, data_root=data_root)))
val_dataloader = dict(dataset=dict(dataset=dict(type=dataset_type, data_root=data_root)))
test_dataloader = val_dataloader
