"""Data sets joined by the names of their classes, against their annotation files."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmdet_moe.datasets import JointDataset
from mmdet_moe.errors import ConfigError

PACK = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
PACK += [dict(type='PackDetInputs', meta_keys=('img_id',))]
FIRST, SECOND = ('5', '2', '9'), ('2', 'none', '7')


@pytest.fixture
def sets(tmp_path, digit_scenes_folder):
    """Two selections of the classes of the same scenes; the file's order is theirs."""
    init_default_scope('mmdet')

    def one(classes, name):
        content = json.loads(
            (digit_scenes_folder / 'annotations/instances_val2017.json').read_text()
        )
        ids = {c['name']: c['id'] for c in content['categories']}
        ids['none'] = 99
        content['categories'] = [dict(id=ids[name], name=name) for name in classes]
        path = tmp_path / f'{name}.json'
        path.write_text(json.dumps(content))
        return dict(
            type='CocoDataset', ann_file=str(path), metainfo=dict(classes=classes),
            filter_cfg=dict(filter_empty_gt=True),
            data_prefix=dict(img=str(digit_scenes_folder / 'val2017')),
        )  # fmt: skip

    return [one(FIRST, 'first'), one(SECOND, 'second')]


def test_labels_and_sources_are_those_of_the_files(sets):
    data = JointDataset(sets, PACK, names=['a', 'b'], test_mode=True)
    assert data.metainfo == {
        'classes': ('5', '2', '9', 'none', '7'), 'sources': ['a', 'b'], 'cumulative_sizes': [8, 16]
    }  # fmt: skip
    for index in range(16):
        source, image = divmod(index, 8)
        content = json.loads(Path(sets[source]['ann_file']).read_text())
        names = {c['id']: c['name'] for c in content['categories']}
        expected = sorted(
            names[a['category_id']]
            for a in content['annotations']
            if a['image_id'] == content['images'][image]['id'] and a['category_id'] in names
        )
        info, sample = data.get_data_info(index), data[index]['data_samples']
        labels = [i['bbox_label'] for i in info['instances']]
        assert sorted(data.metainfo['classes'][label] for label in labels) == expected
        assert sample.gt_instances.labels.tolist() == labels
        assert sample.metainfo['dataset_source'] == info['dataset_source'] == source
        assert data.get_dataset_source(index) == source
    with pytest.raises(IndexError, match='16 is out of range for 16 images'):
        data[16]


def test_in_wrappers_of_data_sets(sets):
    """Rare classes are shown more often, by the classes of all."""
    part = dict(type='mmdet_moe.JointDataset', datasets=sets, pipeline=PACK)
    data = DATASETS.build(part)
    shown = [set(data.get_cat_ids(index)) for index in range(len(data))]
    for index, labels in enumerate(shown):
        sample = data[index]['data_samples']
        assert labels == set(sample.gt_instances.labels.tolist())
    repeated = DATASETS.build(dict(type='RepeatDataset', dataset=part, times=2))
    assert len(repeated) == 2 * len(data)
    balanced = DATASETS.build(dict(type='ClassBalancedDataset', dataset=part, oversample_thr=0.9))
    share = {c: np.mean([c in of for of in shown]) for c in set.union(*shown)}
    times = [
        int(np.ceil(max(max(1, (0.9 / share[c]) ** 0.5) for c in of))) if of else 1 for of in shown
    ]
    assert len(balanced) == sum(times) > len(data)


def test_images_of_which_nothing_is_left_are_replaced(sets):
    """A filter wants objects of a size that half of the images have."""
    data = JointDataset(sets)
    infos = map(data.get_data_info, range(len(data)))
    boxes = [np.array([i['bbox'] for i in info['instances']]).reshape(-1, 4) for info in infos]
    largest = [(box[:, 2:] - box[:, :2]).min(1).max(initial=0) for box in boxes]
    side = float(np.median(largest))
    assert min(largest) < side < max(largest)
    wanted = dict(type='FilterAnnotations', min_gt_bbox_wh=(side, side))
    data = JointDataset(sets, [*PACK[:2], wanted])
    for index in range(len(data)):
        assert (np.diff(data[index]['gt_bboxes'].tensor.view(-1, 2, 2), axis=1) > side).all()
        assert data[index]['gt_bboxes_labels'].size


def test_labels_of_classifiers_move_too():
    @DATASETS.register_module(name='TwoImages', force=True)
    class TwoImages:
        def __init__(self, **metainfo):
            self.metainfo = metainfo

        def __len__(self):
            return 2

        def get_data_info(self, index):
            return dict(gt_label=index)

    xy, yz = (dict(type='TwoImages', classes=classes) for classes in ('xy', 'yz'))
    data = JointDataset([xy, yz])
    assert [np.asarray(data[i]['gt_label']).item() for i in range(4)] == [0, 1, 1, 2]
    with pytest.raises(ConfigError, match=r'datasets\[1\] does not name its classes'):
        JointDataset([xy, dict(type='TwoImages')])


@pytest.mark.parametrize('names', [['a'], ['a', 'a']])
def test_names_that_do_not_fit(names):
    with pytest.raises(ConfigError, match='as many different names as there are datasets, 2'):
        JointDataset([{}, {}], names=names)
