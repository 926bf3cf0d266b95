"""COCO files that other programs wrote: what is mended, refused, and counted."""

# ruff: noqa: F401, F811 (the fixture `root`)

import shutil

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from running import complaint
from test_preflight import CLASSES, config, dataset, root, write_annotations

from mmdet_moe.engine.preflight import check_config


def boxes(**changes):
    """One of each image, in place of those of ``write_annotations``; None leaves a key out."""
    box = dict(category_id=7, bbox=[8, 8, 20, 20], area=400, iscrowd=0) | changes
    box = {key: value for key, value in box.items() if value is not None}
    return [dict(id=i + 1, image_id=i, **box) for i in range(3)]


def metrics_of_the_truth(path):
    """What CocoMetric gives for predictions that are the boxes of ``boxes``."""
    metric = CocoMetric(ann_file=str(path))
    metric.dataset_meta = dict(classes=CLASSES)
    for image in range(3):
        prediction = dict(
            bboxes=torch.tensor([[8.0, 8, 28, 28]]),
            scores=torch.tensor([0.9]),
            labels=torch.tensor([0]),
        )
        metric.process({}, [dict(img_id=image, ori_shape=(64, 64), pred_instances=prediction)])
    return metric.evaluate(3)


@pytest.mark.parametrize(
    ('annotations', 'mark', 'said'),
    [
        (boxes(iscrowd=None), b'', 'giving 3 annotations iscrowd=0'),
        (boxes(area=None), b'', 'giving 3 annotations the area of the box'),
        (boxes(), b'\xef\xbb\xbf', 'leaving out its byte-order mark'),
        ([box | {'id': box['id'] - 1} for box in boxes()], b'', 'numbering its annotations from 1'),
        ([b | {'id': f'a{b["id"]}'} for b in boxes()], b'', 'numbering its annotations from 1'),
    ],
)
def test_what_is_mended(root, capsys, annotations, mark, said):
    """For training and evaluation alike, and said once."""
    path = root / 'annotations' / 'all.json'
    write_annotations(root, annotations=annotations)
    path.write_bytes(mark + path.read_bytes())
    check_config(config(dataset(root), val_dataloader=dict(dataset=dataset(root))))
    assert capsys.readouterr().out == (
        f"note: train_dataloader.dataset.ann_file: '{path}' is read by {said}\n"
    )
    train = dataset(root)
    train.pop('type')
    (instance,) = CocoDataset(**train).get_data_info(0)['instances']
    assert (instance['bbox'], instance['ignore_flag']) == ([8, 8, 28, 28], 0)
    mended = metrics_of_the_truth(path)
    assert mended['coco/bbox_mAP'] == mended['coco/bbox_mAP_s'] == 1
    write_annotations(root, annotations=boxes())
    assert metrics_of_the_truth(path) == mended


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (dict(annotations=boxes(bbox=[])), 'has bbox=[] for the annotation 1, which must be'),
        (dict(annotations=boxes() * 2), 'has two annotations with the id 1; number them anew'),
        (dict(annotations=boxes(category_id=None)), 'has no `category_id` for the annotation 1'),
        (dict(images=[dict(id=0, file_name='0.png', width=64)]), 'has no `height` for the image'),
        (dict(images=[dict(id=0, file_name='0.png', width=64, height=64)] * 2), 'lists two images'),
    ],
)
def test_what_is_refused(root, content, message):
    write_annotations(root, **content)
    found = complaint(config(dataset(root)))
    assert found.startswith('train_dataloader.dataset.ann_file: ')
    assert message in found


def test_annotations_without_a_box(root):
    write_annotations(root, annotations=[*boxes()[:2], dict(id=9, image_id=0, category_id=7)])
    message = complaint(config(dataset(root)))
    assert "has 1 annotations without a `bbox`, such as {'id': 9, 'image_id': 0, 'cat" in message


@pytest.mark.parametrize(
    ('changes', 'ap', 'reason'),
    [
        (dict(bbox=[0.1, 0.1, 0.3, 0.3], area=0.09), 0, 'smaller than a pixel or outside of the i'),
        (dict(bbox=[float('nan')] * 4), 1, 'smaller than a pixel or outside of the image'),
        (dict(area=0), 1, 'smaller than a pixel or outside of the image'),
        (dict(ignore=1), 1, 'marked with `ignore`'),
        (dict(iscrowd=1), -1, 'marked with `iscrowd`'),
        (dict(category_id=5), -1, 'of other categories'),
    ],
)
def test_annotations_none_of_which_is_used(root, capsys, changes, ap, reason):
    """Nothing to train on; -1 is COCO's figure where nothing can be measured."""
    path = root / 'annotations' / 'all.json'
    write_annotations(root, annotations=boxes(**changes))
    train = {k: v for k, v in dataset(root).items() if k != 'type'}
    infos = [info for i in range(3) for info in CocoDataset(**train).get_data_info(i)['instances']]
    assert all(info['ignore_flag'] for info in infos)
    said = f"dataset.ann_file: none of the 3 annotations in '{path}' is used: 3 {reason}"
    assert complaint(config(dataset(root))).startswith(f'train_dataloader.{said}')
    assert metrics_of_the_truth(path)['coco/bbox_mAP'] == ap
    if ap < 0:
        assert complaint(measured_on(dataset(root)), 'test').startswith(f'test_dataloader.{said}')
    else:
        check_config(measured_on(dataset(root)), 'test')
        assert f'0 are used: 3 {reason}' in capsys.readouterr().out
    check_config(measured_on(dataset(root), format_only=True, outfile_prefix='x'), 'test')
    write_annotations(root, annotations=[])
    check_config(config(dataset(root)))
    assert 'note: train_dataloader.dataset: there are no annotations' in capsys.readouterr().out


def test_one_of_several_data_sets_may_show_other_classes_only(root, capsys):
    write_annotations(root, annotations=boxes(category_id=9))
    cats = dict(dataset(root), metainfo=dict(classes=('cat',)))
    cfg = config(dict(type='ConcatDataset', datasets=[cats, cats]))
    cfg.model.bbox_head.num_classes = 1
    check_config(cfg)
    assert '0 are used: 3 of other categories' in capsys.readouterr().out
    cfg.train_dataloader.dataset = cats
    assert 'is used: 3 of other categories; give it boxes [x, y, width, height]' in complaint(cfg)


def test_annotations_that_are_left_out_are_counted(root, capsys):
    others = [
        dict(category_id=9),  # chosen below
        dict(category_id=7),
        dict(category_id=5),  # not in the file
        dict(image_id=77),
        dict(bbox=[3, 3, 0.5, 9]),
        dict(bbox=[70, 3, 9, 9]),
        dict(ignore=1),
        dict(iscrowd=1, category_id=9),
    ]
    more = [boxes(category_id=9)[0] | other | {'id': i + 4} for i, other in enumerate(others)]
    write_annotations(root, annotations=boxes(category_id=9) + more)
    cfg = config(dict(dataset(root), metainfo=dict(classes=('dog',))))
    cfg.model.bbox_head.num_classes = 1
    check_config(cfg)
    assert capsys.readouterr().out == (
        'note: train_dataloader.dataset: of the 11 annotations in '
        f"'{root / 'annotations' / 'all.json'}', 4 are used: 2 of other categories, 2 smaller than "
        'a pixel or outside of the image, 1 of images that the file does not list, 1 marked with '
        '`ignore`, 1 marked with `iscrowd`\n'
    )
    train = cfg.train_dataloader.dataset.to_dict()
    train.pop('type')
    data = CocoDataset(**train)
    infos = [info for i in range(len(data)) for info in data.get_data_info(i)['instances']]
    assert [info['ignore_flag'] for info in infos].count(0) == 4


@pytest.mark.parametrize(
    ('filter_cfg', 'kept'),
    [
        (dict(filter_empty_gt=True), 2),
        (dict(min_size=64), 3),
        (dict(min_size=65), 0),
        (dict(filter_empty_gt=True, min_size=65), 0),
    ],
)
def test_images_that_a_filter_leaves(root, capsys, filter_cfg, kept):
    write_annotations(root, annotations=boxes()[:2])
    cfg = dict(dataset(root), filter_cfg=filter_cfg)
    if kept == 0:
        message = complaint(config(cfg))
        assert message.startswith('train_dataloader.dataset.filter_cfg leaves none of the 3 images')
        check_config(config(None, test_dataloader=dict(dataset=dict(cfg, test_mode=True))), 'test')
        return
    check_config(config(cfg))
    said = f'filter_cfg keeps {kept} of the 3 images'
    assert (said in capsys.readouterr().out) == (kept < 3)
    cfg.pop('type')
    assert len(CocoDataset(**cfg)) == kept


def other_set(root, **changes):
    """A data set of other images beside that of ``root``."""
    other = root.parent / 'other'
    for folder in ('annotations', 'images'):
        (other / folder).mkdir(parents=True)
    write_annotations(other, **changes)
    return dataset(other)


def measured_on(*datasets, **evaluator):
    loader = dict(dataset=dict(type='ConcatDataset', datasets=list(datasets)))
    if len(datasets) == 1:
        loader = dict(dataset=datasets[0])
    evaluator = dict(type='CocoMetric') | evaluator
    return config(None, test_dataloader=loader, test_evaluator=evaluator)


def test_data_sets_that_share_image_ids(root):
    other = other_set(root, images=[dict(id=2, file_name='x.png', width=9, height=9)])
    shutil.copy(root / 'images' / '0.png', root.parent / 'other' / 'images' / 'x.png')
    message = complaint(measured_on(dataset(root), other), 'test')
    assert message.startswith(
        'test_dataloader.dataset.datasets[0] and test_dataloader.dataset.datasets[1] share image '
        'ids such as 2, by which test_evaluator tells images, so that it would mix them'
    )
    apart = dict(
        type='MultiDatasetsEvaluator', metrics=[dict(type='CocoMetric')] * 2, dataset_prefixes='ab'
    )
    check_config(measured_on(dataset(root), other, **apart), 'test')
    image = dict(id=3, file_name='x.png', width=9, height=9)
    write_annotations(root.parent / 'other', images=[image], annotations=[])
    check_config(measured_on(dataset(root), other), 'test')


def test_the_metric_reads_the_file_of_the_data_set(root, capsys):
    path = root / 'annotations' / 'all.json'
    copy = shutil.copy(path, root / 'copy.json')
    for ann_file in (str(path), f'{root}/images/../annotations/all.json', str(copy)):
        check_config(measured_on(dataset(root), ann_file=ann_file), 'test')
    other = other_set(root, images=[dict(id=2, file_name='x.png', width=9, height=9)])
    ann_file = f'{other["data_root"]}/annotations/all.json'
    message = complaint(measured_on(dataset(root), ann_file=ann_file), 'test')
    assert message.startswith(f"test_evaluator.ann_file: '{ann_file}' does not list the images of")
    assert 'as missed' not in capsys.readouterr().out
    check_config(measured_on(dict(dataset(root), indices=2), ann_file=str(path)), 'test')
    assert 'of all 3 images as missed but for those that' in capsys.readouterr().out
