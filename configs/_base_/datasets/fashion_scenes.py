# Clothes from Fashion-MNIST on photographs, from the generator of digit_scenes.py: `tools/
# prepare_data.py digit-scenes --sprites fashion-mnist --source DIR --out data/fashion-scenes`.
# Another folder: `export FASHION_SCENES_ROOT=DIR`, or `--cfg-options data_root=DIR`.
_base_ = './digit_scenes.py'
data_root = '{{$FASHION_SCENES_ROOT:data/fashion-scenes}}'
metainfo = dict(
    classes=(
        'T-shirt/top',
        'Trouser',
        'Pullover',
        'Dress',
        'Coat',
        'Sandal',
        'Shirt',
        'Sneaker',
        'Bag',
        'Ankle boot',
    )
)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator
