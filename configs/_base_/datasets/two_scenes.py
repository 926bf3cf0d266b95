# Digit scenes and fashion scenes (see digit_scenes.py and fashion_scenes.py) as one data set of 20
# classes; each image knows the set it comes from. Other folders: `export DIGIT_SCENES_ROOT=DIR` and
# `export FASHION_SCENES_ROOT=DIR`.
#
# An image has labels for the classes of its own set alone; the detector learns that all else is
# background. Nothing is wrong with that here, because no scene shows both digits and clothes. Where
# objects of one set's classes appear unlabelled in the other's images, they are taught as false
# positives, and recall falls: label them first, or leave such classes out of the loss there.
_base_ = './fashion_scenes.py'
digits = dict(
    type='CocoDataset',
    data_root='{{$DIGIT_SCENES_ROOT:data/digit-scenes}}',
    metainfo=dict(classes=('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')),
)
fashion = dict(type='CocoDataset', data_root={{_base_.data_root}}, metainfo={{_base_.metainfo}})
names = ('digits', 'fashion')
train = dict(
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    filter_cfg=dict(filter_empty_gt=True, min_size=32),
)
val = dict(
    ann_file='annotations/instances_val2017.json',
    data_prefix=dict(img='val2017/'),
    test_mode=True,
)
# The metric takes the ground truth, `instances`, from the images: the files have other labels.
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmdet_moe.JointDataset',
        names=names,
        datasets=[dict(**digits, **train), dict(**fashion, **train)],
        pipeline={{_base_.train_pipeline}},
    )
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={{_base_.image_size}}, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmdet_moe.JointDataset',
        names=names,
        datasets=[dict(**digits, **val), dict(**fashion, **val)],
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
# AP of each set by itself, over its own classes.
val_evaluator = dict(
    _delete_=True,
    type='MultiDatasetsEvaluator',
    metrics=[dict(type='CocoMetric', metric='bbox'), dict(type='CocoMetric', metric='bbox')],
    dataset_prefixes=names,
)
test_evaluator = val_evaluator
