"""Data sets as the analysis sees them: nothing filtered, nothing augmented, crowds told apart."""

import copy
import json
import shutil
from pathlib import Path

import cv2
import miniature
import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from running import CONFIGS, ROOT

from mmdet_moe.analysis.data import AnalysisData, drawn, loader_of
from mmdet_moe.cli import load_config
from mmdet_moe.datasets import idx
from mmdet_moe.datasets.rotated_pairs import rotated_square
from mmdet_moe.errors import ConfigError

CLASSES = tuple('0123456789')


@pytest.fixture
def root(tmp_path, digit_scenes_folder):
    """Scenes whose first image has every kind of annotation, and whose second has none."""
    shutil.copytree(digit_scenes_folder, tmp_path / 'data')
    for split in ('train', 'val'):
        path = tmp_path / 'data' / 'annotations' / f'instances_{split}2017.json'
        content = json.loads(path.read_text())
        first, second = content['images'][:2]
        kept = [
            a for a in content['annotations'] if a['image_id'] not in (first['id'], second['id'])
        ]
        ids = {c['name']: c['id'] for c in content['categories']}
        content['categories'].append({'id': 99, 'name': 'unknown'})

        def make(number, name, box, first=first, ids=ids, **more):
            category = ids.get(name, 99)
            return {
                'id': 5000 + number, 'image_id': first['id'], 'category_id': category,
                'bbox': box, 'area': box[2] * box[3] / 2, 'iscrowd': 0, **more,
            }  # fmt: skip

        kept += [
            make(0, '3', [10.5, 20.25, 30, 40]),
            make(1, '7', [0, 0, 64, 64], iscrowd=1),
            make(2, 'unknown', [1, 2, 30, 4]),
            make(3, '0', [100, 100, 28, 28]),
            make(4, '1', [50, 50, 20, 20], ignore=1),
        ]
        content['annotations'] = kept
        path.write_text(json.dumps(content))
    return tmp_path / 'data'


def config(root, **val):
    def dataset(split, **more):
        return dict(
            type='CocoDataset', data_root=str(root), metainfo=dict(classes=CLASSES),
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'), **more,
        )  # fmt: skip

    init_default_scope('mmdet')
    test = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
    train = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackDetInputs'),
    ]
    filters = dict(filter_empty_gt=True, min_size=32)
    return Config(
        dict(
            train_dataloader=dict(
                batch_size=3, num_workers=0, drop_last=True,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                batch_sampler=dict(type='AspectRatioBatchSampler'),
                dataset=dict(
                    type='RepeatDataset', times=3,
                    dataset=dataset('train', filter_cfg=filters, pipeline=train),
                ),
            ),
            val_dataloader=dict(
                batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=dataset('val', test_mode=True, pipeline=test, **val),
            ),
            test_dataloader=dict(
                batch_size=2, num_workers=0,
                dataset=dataset('val', test_mode=True, pipeline=test),
            ),
        )
    )  # fmt: skip


@pytest.mark.parametrize('split', ['val', 'test', 'train'])
def test_objects(split, root):
    data = AnalysisData(config(root), split)
    images = json.loads(
        (root / 'annotations' / f'instances_{"train" if split == "train" else "val"}2017.json')
        .read_text()
    )['images']  # fmt: skip
    assert len(data) == len(images) == (16 if split == 'train' else 8)
    assert data.classes == list(CLASSES)
    assert [data.info(i)['img_id'] for i in range(len(data))] == [i['id'] for i in images]
    first = data.objects(0)
    assert first.boxes.tolist() == [
        [10.5, 20.25, 40.5, 60.25],
        [0, 0, 64, 64],
        [100, 100, 128, 128],
        [50, 50, 70, 70],  # to be ignored, which COCO's evaluation does not
    ]
    assert first.labels.tolist() == [3, 7, 0, 1]
    assert first.areas.tolist() == [600, 2048, 392, 200]
    assert first.crowd.tolist() == [False, True, False, False]
    assert (first.boxes.dtype, first.labels.dtype) == (np.float32, np.int64)
    second = data.objects(1)
    assert second.boxes.shape == (0, 4)
    assert len(second.labels) == len(second.areas) == len(second.crowd) == 0
    assert data.image_size(0) == (128, 128)
    stored = cv2.imread(data.info(0)['img_path'])
    assert np.array_equal(data.image(0), stored[..., ::-1])


def test_training_images_are_not_changed(root):
    cfg = config(root)
    loader = loader_of(cfg, 'train')
    assert loader.sampler == dict(type='DefaultSampler', shuffle=False)
    assert not loader.drop_last
    assert 'batch_sampler' not in loader
    data = AnalysisData(cfg, 'train')
    for index in (0, 1, 5):
        inputs = data.dataset[index]['inputs'].numpy()  # BGR
        assert np.array_equal(inputs[::-1].transpose(1, 2, 0), data.image(index))


@pytest.mark.parametrize('joined', ['train', 'test'])
def test_several_training_sets(root, joined):
    """Each goes through the pipeline of the tests, unrepeated, with its images without objects."""
    cfg = config(root)
    loader = cfg[f'{joined}_dataloader']
    cfg.default_scope = 'mmdet'
    loader.dataset = dict(type='ConcatDataset', datasets=[copy.deepcopy(loader.dataset)] * 2)
    one = AnalysisData(config(root), 'train')
    data = AnalysisData(cfg, 'train')
    assert len(data) == len(one) * (2 if joined == 'train' else 1)
    for index in (0, 1, len(data) - 1):
        assert np.array_equal(data.image(index), one.image(index % len(one)))
        inputs = data.dataset[index]['inputs'].numpy()
        assert np.array_equal(inputs[::-1].transpose(1, 2, 0), data.image(index))
        expected = one.objects(index % len(one))
        for name, value in vars(data.objects(index)).items():
            assert np.array_equal(value, getattr(expected, name)), name


def test_joined_classes_and_areas(root):
    """By name, at any depth; areas are those of the annotations, not of the boxes."""
    cfg = config(root)
    own = cfg.val_dataloader.pop('dataset')
    pipeline = own.pop('pipeline')
    other = copy.deepcopy(own)
    other.metainfo = dict(classes=('3', '7'))
    joint = dict(type='mmdet_moe.JointDataset', pipeline=pipeline, test_mode=True)
    inner = dict(joint, datasets=[other, own])
    cfg.val_dataloader.dataset = dict(joint, datasets=[inner, own])
    data = AnalysisData(cfg, 'val')
    assert data.classes == ['3', '7', '0', '1', '2', '4', '5', '6', '8', '9']
    for index, labels, areas in (
        (0, [0, 1], [600, 2048]),
        (8, [0, 1, 2, 3], [600, 2048, 392, 200]),
        (16, [0, 1, 2, 3], [600, 2048, 392, 200]),
    ):
        assert data.objects(index).labels.tolist() == labels
        assert data.objects(index).areas.tolist() == areas


@pytest.mark.parametrize('inside', [False, True])
def test_repeated_images_are_refused(root, inside):
    cfg = config(root)
    repeated = dict(type='RepeatDataset', times=3, dataset=cfg.val_dataloader.pop('dataset'))
    joined = dict(type='ConcatDataset', datasets=[repeated])
    cfg.val_dataloader.dataset = joined if inside else repeated
    with pytest.raises(ConfigError, match=r'val_dataloader\.dataset: RepeatDataset repeats images'):
        AnalysisData(cfg, 'val')


def test_drawn_images_are_of_all_classes():
    """In any order of the data: classes that take turns, or that come one after the other."""
    chosen = drawn(10_000, 500)
    assert chosen == sorted(set(chosen)) == drawn(10_000, 500)
    assert len(chosen) == 500
    for classes in ([i % 100 for i in chosen], [i // 100 for i in chosen]):
        counts = [classes.count(c) for c in range(100)]
        assert counts.count(0) < 5
        assert max(counts) < 16
    assert drawn(9, 9) == drawn(9, 20) == list(range(9))


def test_a_part_of_the_images(root):
    """Whatever is asked about them is what the whole knows of the same ones."""
    cfg = config(root)
    one = cfg.val_dataloader.dataset
    pipeline = one.pop('pipeline')
    cfg.val_dataloader.dataset = dict(
        type='mmdet_moe.JointDataset', names=('a', 'b'), datasets=[one, copy.deepcopy(one)],
        pipeline=pipeline, test_mode=True,
    )  # fmt: skip
    whole, part = AnalysisData(cfg, 'val'), AnalysisData(cfg, 'val', 6)
    assert (len(whole), len(part)) == (16, 6)
    assert part.chosen == drawn(16, 6) != list(range(6))
    assert part.classes == whole.classes
    for index, place in enumerate(part.chosen):
        assert part.path(index) == whole.path(place)
        assert part.image_size(index) == whole.image_size(place)
        assert np.array_equal(part.image(index), whole.image(place))
        for name, value in vars(part.objects(index)).items():
            assert np.array_equal(value, getattr(whole.objects(place), name)), name
    assert part.sources[0] == whole.sources[0] == ['a', 'b']
    assert part.sources[1].tolist() == [place // 8 for place in part.chosen]
    assert [index for of in part.groups.values() for index in of] == list(range(6))

    def numbers(batches):
        return [sample.img_path for batch in batches for sample in batch['data_samples']]

    assert numbers(part.batches()) == [part.path(i) for i in range(6)]
    assert numbers(part.batches([4, 1, 2])) == [part.path(i) for i in (4, 1, 2)]


def test_the_digest_is_of_what_is_known_of_the_images(root):
    digest = AnalysisData(config(root), 'val', 2).digest()
    assert digest == AnalysisData(config(root), 'val').digest()
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][-1]['area'] += 1
    path.write_text(json.dumps(content))
    assert AnalysisData(config(root), 'val').digest() != digest


def test_an_unreadable_image_is_named(root):
    data = AnalysisData(config(root), 'val')
    path = Path(data.info(3)['img_path'])
    for content in (b'no image', b'', None):
        path.unlink() if content is None else path.write_bytes(content)
        for read in (data.image, data.dataset.__getitem__):
            with pytest.raises(ConfigError, match=f"^cannot read the image '{path}': "):
                read(3)


def test_subset_of_the_classes(root):
    cfg = config(root)
    cfg.val_dataloader.dataset.metainfo = dict(classes=('3', '7'))
    data = AnalysisData(cfg, 'val')
    assert data.classes == ['3', '7']
    assert data.objects(0).labels.tolist() == [0, 1]


def test_number_of_images(root):
    assert len(AnalysisData(config(root), 'val', 3)) == 3
    assert len(AnalysisData(config(root), 'val', 300)) == 8


def test_subset_of_the_images(root):
    data = AnalysisData(config(root, indices=[4, 0]), 'val')
    assert len(data) == 2
    assert data.objects(1).labels.tolist() == [3, 7, 0, 1]


def test_missing_splits(root):
    cfg = config(root)
    cfg.val_dataloader = None
    with pytest.raises(ConfigError, match='--split val: the config has no val_dataloader; it has'):
        AnalysisData(cfg, 'val')
    AnalysisData(cfg, 'train')
    cfg.test_dataloader = None
    with pytest.raises(ConfigError, match='--split train: the config has no test_dataloader'):
        AnalysisData(cfg, 'train')


class TestSuperclasses:
    def test_of_coco(self, root):
        assert AnalysisData(config(root), 'val').superclasses is None
        path = root / 'annotations' / 'instances_val2017.json'
        content = json.loads(path.read_text())
        for category in content['categories']:
            category['supercategory'] = 'even' if category['name'] in '02468' else 'odd'
        path.write_text(json.dumps(content))
        found = AnalysisData(config(root), 'val').superclasses
        assert found == {'even': [0, 2, 4, 6, 8], 'odd': [1, 3, 5, 7, 9]}

    def test_of_cifar100(self):
        pytest.importorskip('mmpretrain')
        from mmpretrain.datasets.categories import CIFAR100_CATEGORIES

        from mmdet_moe.analysis.superclasses import superclasses

        found = superclasses(CIFAR100_CATEGORIES, None)
        group_of = {label: name for name, members in found.items() for label in members}
        names = sorted(found)  # the order of the published labels
        labels = [names.index(group_of[label]) for label in range(100)]
        assert labels == miniature.COARSE_LABELS
        published = [name.replace('_', ' ') for name in miniature.COARSE_NAMES]
        published[miniature.COARSE_NAMES.index('medium_mammals')] = 'medium-sized mammals'
        assert names == published
        assert superclasses(CIFAR100_CATEGORIES[:99], None) is None


def test_arrays_as_images():
    """Data sets that are one array, grey or in colour."""
    from mmengine.registry import DATASETS

    class Arrays:
        metainfo = {}

        def __init__(self, **_):
            rng = np.random.default_rng(0)
            self.rows = [
                {'img': rng.integers(0, 255, shape, dtype=np.uint8), 'gt_label': label}
                for shape, label in (((5, 7), 0), ((5, 7, 1), 2), ((5, 7, 3), np.array([1])))
            ]
            for row, group in zip(self.rows, ('mark', 1, 'mark'), strict=True):
                row['group'] = group

        def __len__(self):
            return 3

        def get_data_info(self, index):
            return self.rows[index]

        __getitem__ = get_data_info

    DATASETS.register_module(module=Arrays, name='ArraysOfTest', force=True)
    init_default_scope('mmengine')
    loader = ConfigDict(batch_size=1, num_workers=0, dataset=dict(type='mmengine.ArraysOfTest'))
    data = AnalysisData(Config(dict(val_dataloader=loader)), 'val')
    loader.update(num_workers=1, prefetch_factor=2, persistent_workers=True)
    with_workers = AnalysisData(Config(dict(val_dataloader=loader)), 'val')
    assert len(list(with_workers.batches([0], num_workers=0))) == 1
    for index, label in enumerate((0, 2, 1)):
        image = data.image(index)
        assert (image.shape, data.image_size(index)) == ((5, 7, 3), (5, 7))
        assert np.array_equal(image, np.dstack([data.info(index)['img'].reshape(5, 7, -1)] * 3)[
            ..., :3]) or index == 2  # fmt: skip
        assert data.label(index) == label
    assert np.array_equal(data.image(2), data.info(2)['img'])
    assert data.classes == ['0', '1', '2']
    assert {name: images.tolist() for name, images in data.groups.items()} == {
        'mark': [0, 2], '1': [1]
    }  # fmt: skip


@pytest.mark.parametrize(('split', 'prefix', 'count'), [
    ('train', 'train', 12), ('val', 't10k', 7), ('test', 't10k', 7),
])  # fmt: skip
def test_images_in_idx_files(split, prefix, count, tmp_path):
    """MMPretrain's FashionMNIST chooses its files by test_mode, and holds grey arrays."""
    root = miniature.write_fashion_mnist(tmp_path, num_train=12, num_test=7)
    path = CONFIGS / 'resnet18_moe_soft_fashion_mnist.py'
    cfg = load_config(str(path), {'data_root': str(root)})
    init_default_scope(cfg.default_scope)
    data = AnalysisData(cfg, split)
    images = idx.read_idx(root / f'{prefix}-images-idx3-ubyte', 3)
    labels = idx.read_idx(root / f'{prefix}-labels-idx1-ubyte', 1)
    assert len(data) == len(images) == count
    assert [data.label(i) for i in range(count)] == labels.tolist()
    for i in (0, count - 1):
        assert data.image_size(i) == (28, 28)
        assert np.array_equal(data.image(i), np.stack([images[i]] * 3, axis=-1))


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 7)])
def test_wrappers_that_define_the_samples_stay(split, count, tmp_path):
    """Rotated pairs are rotated in the training split, too, but neither flipped nor repeated."""
    root = miniature.write_fashion_mnist(tmp_path, num_train=12, num_test=7)
    path = CONFIGS / 'moe_rotate_resnet18_fashion_mnist.py'
    cfg = load_config(str(path), {'data_root': str(root)})
    init_default_scope(cfg.default_scope)
    pairs = cfg.train_dataloader.dataset
    pairs.dataset.pipeline[0].prob = 1.0
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=pairs)
    data = AnalysisData(cfg, split)
    assert len(data) == 2 * count
    assert data.classes == ['upright', 'rotated']
    assert data.clusters[:2] == ['T-shirt/top', 'Trouser']
    prefix = 'train' if split == 'train' else 't10k'
    images = idx.read_idx(root / f'{prefix}-images-idx3-ubyte', 3)
    labels = idx.read_idx(root / f'{prefix}-labels-idx1-ubyte', 1)
    for i in (0, 9, 2 * count - 1):
        assert (data.label(i), data.cluster(i)) == (i % 2, labels[i // 2])
        shown = rotated_square(images[i // 2], 30, rotate=i % 2 == 1)
        assert np.array_equal(data.image(i)[..., 0], shown)
        sample = data.dataset[i]
        assert np.array_equal(sample['inputs'][0].numpy(), shown)
        assert sample['data_samples'].cluster == labels[i // 2]


def test_patches_are_no_images():
    configs = ROOT / 'projects' / 'cluster_theory' / 'configs'
    cfg = load_config(str(configs / 'mixture.py'))
    cfg.val_dataloader.dataset.num_samples = 10
    init_default_scope(cfg.default_scope)
    with pytest.raises(ConfigError, match=r'^val_dataloader\.dataset: ClusterPatches has no '):
        AnalysisData(cfg, 'val')
