"""Every complaint of the preflight, on small files."""

import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from running import complaint

from mmdet_moe.engine.preflight import (
    check_checkpoint,
    check_config,
    recorded_checkpoint,
    resumable_checkpoint,
)
from mmdet_moe.errors import ConfigError

CLASSES = ('cat', 'dog')


@pytest.fixture
def root(tmp_path):
    """A data set of three images in COCO's layout."""
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    (folder / 'images').mkdir()
    for index in range(3):
        image = np.full((64, 64, 3), 50 * index, np.uint8)
        cv2.imwrite(str(folder / 'images' / f'{index}.png'), image)
    write_annotations(folder)
    return folder


def write_annotations(root, **changes):
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(3)],
        annotations=[
            dict(id=i, image_id=i, category_id=7, bbox=[8, 8, 20, 20], area=400, iscrowd=0)
            for i in range(3)
        ],
        categories=[dict(id=7, name='cat'), dict(id=9, name='dog')],
    )
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    (root / 'annotations' / 'all.json').write_text(json.dumps(content))


def dataset(root, **changes):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='annotations/all.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=CLASSES),
        **changes,
    )


def config(train_dataset, **changes):
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet', bbox_head=dict(type='RetinaHead', num_classes=2)),
            train_dataloader=dict(dataset=train_dataset),
            **changes,
        )
    )


def test_a_good_config_passes(root):
    ann_file = str(root / 'annotations' / 'all.json')
    evaluator = dict(type='CocoMetric', ann_file=ann_file)
    cfg = config(
        dataset(root),
        val_dataloader=dict(dataset=dataset(root)),
        val_evaluator=evaluator,
        test_dataloader=dict(dataset=dataset(root)),
        test_evaluator=[evaluator],
        custom_hooks=[dict(type='NumClassCheckHook')],
        load_from='https://example.com/model.pth',
    )
    check_config(cfg)
    check_config(cfg, 'test')


def test_missing_root(root):
    cfg = dataset(root)
    cfg['data_root'] = str(root / 'gone')
    message = complaint(config(cfg))
    assert message.startswith('train_dataloader.dataset.data_root: there is no folder')
    for fix in ('tools/prepare_data.py', '--cfg-options data_root=DIR', 'COCO_ROOT'):
        assert fix in message


def test_missing_annotation_file(root):
    (root / 'annotations' / 'all.json').unlink()
    message = complaint(config(dataset(root)))
    assert message.startswith('train_dataloader.dataset.ann_file: there is no file')
    assert 'tools/prepare_data.py' in message


def test_missing_image_folder(root):
    cfg = dataset(root)
    cfg['data_prefix'] = dict(img='elsewhere/')
    message = complaint(config(cfg))
    assert message.startswith('train_dataloader.dataset.data_prefix.img: there is no folder')


def test_missing_file_of_an_evaluator(root):
    cfg = config(
        dataset(root),
        val_dataloader=dict(dataset=dataset(root)),
        val_evaluator=[dict(type='CocoMetric', ann_file='gone.json')],
    )
    message = complaint(cfg)
    assert message.startswith("val_evaluator[0].ann_file: there is no file 'gone.json'")


def test_annotations_that_are_no_json(root):
    (root / 'annotations' / 'all.json').write_text('{"images": [')
    message = complaint(config(dataset(root)))
    assert re.match(r"train_dataloader\.dataset\.ann_file: '.*' is not JSON", message)


@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
def test_annotations_that_are_not_coco(root, key):
    write_annotations(root, **{key: None})
    message = complaint(config(dataset(root)))
    assert message.endswith(f'is not a COCO annotation file, it has no `{key}`')


def test_annotations_that_are_a_list(root):
    (root / 'annotations' / 'all.json').write_text('[]')
    assert 'is not a COCO annotation file' in complaint(config(dataset(root)))


def test_an_unlabelled_split_passes_where_results_are_only_written(root):
    write_annotations(root, annotations=None)
    loader = dict(dataset=dataset(root))
    evaluator = dict(type='CocoMetric', format_only=True)
    check_config(config(None, test_dataloader=loader, test_evaluator=evaluator), 'test')
    evaluator['format_only'] = False
    cfg = config(None, test_dataloader=loader, test_evaluator=evaluator)
    assert complaint(cfg, 'test').startswith('test_dataloader.dataset.ann_file')


def test_no_images_listed(root):
    write_annotations(root, images=[])
    assert complaint(config(dataset(root))).endswith('lists no images')


def test_unknown_classes(root):
    cfg = dataset(root)
    cfg['metainfo'] = dict(classes=('cat', 'zebra'))
    message = complaint(config(cfg))
    assert message.startswith("train_dataloader.dataset.metainfo.classes: 'zebra' not among")
    assert "which has 'cat', 'dog'" in message


def test_classes_of_the_dataset_class(root):
    cfg = dataset(root)
    del cfg['metainfo']  # leaves the 80 classes of COCO
    message = complaint(config(cfg))
    assert "'person', 'bicycle', 'car', 'motorcycle', 'airplane' and 73 more" in message


def test_classes_in_another_order(root):
    cfg = dataset(root)
    cfg['metainfo'] = dict(classes=('dog', 'cat'))
    assert 'in the order of the categories of' in complaint(config(cfg))


def test_a_part_of_the_classes_may_be_chosen(root):
    cfg = config(dict(dataset(root), metainfo=dict(classes=('cat',))))
    cfg.model.bbox_head.num_classes = 1
    check_config(cfg)


def test_classes_as_a_bare_string(root, tmp_path):
    cfg = config(dict(dataset(root), metainfo=dict(classes='dog')))
    assert "write one class as ('dog',)" in complaint(cfg)
    (tmp_path / 'names.txt').write_text('cat\ndog\n')
    cfg = config(dict(dataset(root), metainfo=dict(classes=str(tmp_path / 'names.txt'))))
    check_config(cfg)


def test_images_elsewhere(root):
    for image in (root / 'images').iterdir():
        image.unlink()
    message = complaint(config(dataset(root)))
    assert 'none of the first 3 images' in message
    assert '0.png' in message


def test_an_empty_image(root):
    (root / 'images' / '1.png').write_bytes(b'')
    message = complaint(config(dataset(root)))
    assert re.search(r"the image '.*1\.png' is an empty file", message)


@pytest.mark.parametrize(
    ('model', 'field'),
    [
        (dict(bbox_head=dict(num_classes=80)), 'model.bbox_head'),
        (dict(roi_head=dict(bbox_head=dict(num_classes=80))), 'model.roi_head.bbox_head'),
        (
            dict(roi_head=dict(bbox_head=[dict(num_classes=2), dict(num_classes=80)])),
            'model.roi_head.bbox_head[1]',
        ),
        (dict(roi_head=dict(mask_head=dict(num_classes=80))), 'model.roi_head.mask_head'),
        (dict(detector=dict(bbox_head=dict(num_classes=80))), 'model.detector.bbox_head'),
    ],
)
def test_num_classes(root, model, field):
    cfg = config(dataset(root))
    cfg.model = model
    message = complaint(cfg)
    assert message.startswith(f'{field}.num_classes is 80, but train_dataloader.dataset has 2')
    assert message.endswith(f'set {field}.num_classes=2')


def test_wrappers_are_looked_into(root):
    broken = dataset(root / 'gone')
    nested = dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[dataset(root), broken]),
    )
    message = complaint(config(nested))
    assert message.startswith('train_dataloader.dataset.dataset.datasets[1].data_root')
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=broken)
    message = complaint(config(balanced))
    assert message.startswith('train_dataloader.dataset.dataset.data_root')


def test_remote_data_are_left_alone(root):
    cfg = dict(dataset(root / 'gone'), backend_args=dict(backend='petrel'))
    check_config(config(cfg))
    check_config(config(dict(dataset(root), data_root='s3://bucket/coco/')))
    check_config(config(dict(dataset(root), data_prefix=dict(img='s3://bucket/coco/train2017/'))))
    check_config(config(dict(dataset(root), ann_file='s3://bucket/train.json')))


def test_an_unknown_dataset_is_left_to_the_builder(root):
    check_config(config(dict(dataset(root), type='NoSuchDataset')))
    check_config(config(dict(dataset(root), type='mmdet_moe.NoSuchDataset')))


def test_mmpretrain_datasets(tmp_path):
    def classifier(**cfg):
        return Config(
            dict(default_scope='mmpretrain', model={}, train_dataloader=dict(dataset=cfg))
        )

    gone = str(tmp_path / 'gone')
    message = complaint(classifier(type='CustomDataset', data_root=gone))
    assert message.startswith('train_dataloader.dataset.data_root')
    message = complaint(classifier(type='CustomDataset', data_prefix=gone))
    assert message.startswith('train_dataloader.dataset.data_prefix: there is no folder')
    check_config(classifier(type='CustomDataset', data_prefix=str(tmp_path)))
    check_config(classifier(type='CIFAR10', data_root=gone))  # downloads by default
    message = complaint(classifier(type='CIFAR100', data_root=gone, download=False))
    assert message.startswith('train_dataloader.dataset.data_root')


def test_missing_checkpoints(root, tmp_path):
    gone = str(tmp_path / 'gone.pth')
    message = complaint(config(dataset(root), load_from=gone))
    assert message.startswith(f"load_from: there is no file '{gone}'; train that model first")
    message = complaint(config(None, test_dataloader=dict(dataset=dataset(root))), 'test', gone)
    assert message.startswith(f"checkpoint: there is no file '{gone}'; give the path")
    cfg = config(dataset(root))
    cfg.model.backbone = dict(init_cfg=dict(type='Pretrained', checkpoint=gone))
    message = complaint(cfg)
    assert message.startswith(f"model.backbone.init_cfg.checkpoint: there is no file '{gone}'")
    cfg.model.backbone.init_cfg.checkpoint = 'torchvision://resnet50'
    check_config(cfg)


def test_what_is_a_checkpoint(tmp_path):
    path = tmp_path / 'model.pth'
    for new_format in (True, False):
        torch.save({'a': torch.zeros(2)}, path, _use_new_zipfile_serialization=new_format)
        check_checkpoint(str(path), 'load_from')
    torch.save({'a': torch.zeros(2000)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r'load_from: .* incomplete'):
        check_checkpoint(str(path), 'load_from')
    path.write_bytes(b'')
    with pytest.raises(ConfigError, match=r'load_from: .* incomplete'):
        check_checkpoint(str(path), 'load_from')


def test_checkpoint_to_resume_from(tmp_path):
    def write(name, time, part=1.0):
        torch.save({'a': torch.zeros(2000)}, path := tmp_path / name)
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        os.utime(path, (time, time))
        return str(path)

    record = tmp_path / 'last_checkpoint'
    assert resumable_checkpoint(tmp_path) is recorded_checkpoint(tmp_path) is None
    write('best_epoch_9.pth', 9)
    record.write_text('')  # interrupted between opening and writing
    assert resumable_checkpoint(tmp_path) is recorded_checkpoint(tmp_path) is None
    older, newer = write('epoch_8.pth', 1), write('epoch_3.pth', 2)
    broken = write('epoch_4.pth', 3, part=0.9)
    assert resumable_checkpoint(tmp_path) == newer
    for name, found in (('epoch_4.pth', newer), ('epoch_5.pth', newer), ('epoch_8.pth', older)):
        record.write_text(f'/elsewhere/{name}')
        assert recorded_checkpoint(tmp_path) == str(tmp_path / name)
        assert resumable_checkpoint(tmp_path) == found
    with pytest.raises(ConfigError, match='incomplete'):
        check_checkpoint(broken, 'load_from')


def test_checkpoints_in_another_folder(tmp_path):
    other, work_dir = tmp_path / 'other', tmp_path / 'run'
    for folder in (other, work_dir):
        folder.mkdir()
    torch.save({}, other / 'iter_2.pth')
    (work_dir / 'last_checkpoint').write_text(f'{other}/iter_2.pth')
    assert resumable_checkpoint(work_dir) == f'{other}/iter_2.pth'
    torch.save({}, work_dir / 'iter_2.pth')  # a copy of the run
    assert resumable_checkpoint(work_dir) == f'{work_dir}/iter_2.pth'
    (work_dir / 'last_checkpoint').write_text('s3://bucket/iter_2.pth')
    assert resumable_checkpoint(work_dir) == 's3://bucket/iter_2.pth'


def test_hooks(root):
    cfg = config(dataset(root), custom_hooks=dict(type='NumClassCheckHook'))
    assert complaint(cfg).startswith('custom_hooks must be a list')
    cfg = config(dataset(root), custom_hooks=[dict(interval=2)])
    assert complaint(cfg).startswith('custom_hooks[0] must be a dict with')
    cfg = config(dataset(root), default_hooks=[dict(type='IterTimerHook')])
    assert complaint(cfg).startswith('default_hooks must be a dict')


@pytest.mark.parametrize(
    ('field', 'value'),
    [('train_cfg.val_interval', 1.5), ('optim_wrapper.accumulative_counts', 2.5)],
)
def test_counts(root, field, value):
    cfg = config(dataset(root), optim_wrapper=dict(), train_cfg=dict())
    cfg.merge_from_dict({field: value})
    assert complaint(cfg).endswith(f'={value} must be an integer of at least 1')


def test_fields_of_loaders(root):
    cfg = config(dataset(root), val_dataloader=dict(dataset=dataset(root)))
    cfg.train_dataloader.update(batch_size=2, num_batch_per_epoch=3, sampler=None, timeout=0)
    cfg.train_dataloader.disable_subprocess_warning = True
    check_config(cfg)
    cfg.train_dataloader.batchsize = 3
    assert complaint(cfg) == (
        "train_dataloader.batchsize: a data loader has no such field; did you mean 'batch_size'?"
    )
    del cfg.train_dataloader['batchsize']
    cfg.val_dataloader.qqq = 1
    assert complaint(cfg).startswith('val_dataloader.qqq: a data loader has no such field; it has ')
