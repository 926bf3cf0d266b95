"""Every complaint of the preflight about CIFAR and the idx files of MNIST's format."""

import struct

import numpy as np
import pytest
from miniature import (
    expect_cifar,
    write_cifar10,
    write_cifar100,
    write_fashion_mnist,
    write_idx_pair,
)
from mmengine.config import Config
from mmpretrain.datasets import CIFAR100, MNIST, FashionMNIST
from running import complaint

from mmdet_moe.datasets.idx import SPLITS
from mmdet_moe.engine.preflight import arrays, check_config
from mmdet_moe.errors import ConfigError

NUM_CLASSES = {'CIFAR100': 100}


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    folder = write_cifar100(tmp_path)
    expect_cifar(monkeypatch, folder)
    return folder


@pytest.fixture
def fashion(tmp_path):
    return write_fashion_mnist(tmp_path / 'fashion')


def config(type_, root, num_classes=None, **changes):
    """A classifier with the same options for the data of training and validation."""

    def loader(is_test):
        splits = dict(split='test' if is_test else 'train', test_mode=is_test)
        options = dict(type=type_, data_root=str(root), download=False) | splits | changes
        return dict(dataset=options)

    head = dict(type='LinearClsHead', num_classes=num_classes or NUM_CLASSES.get(type_, 10))
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='ImageClassifier', head=head),
            train_dataloader=loader(is_test=False),
            val_dataloader=loader(is_test=True),
        )
    )


# --- CIFAR --------------------------------------------------------------------------------------


def test_good_cifar_passes_and_is_read_once(cifar100, monkeypatch):
    read = []
    md5_of = arrays.md5_of
    monkeypatch.setattr(
        arrays, 'md5_of', lambda path, **kw: read.append(path) or md5_of(path, **kw)
    )
    check_config(config('CIFAR100', cifar100.parent))
    assert sorted(read) == [str(cifar100 / name) for name in ('meta', 'test', 'train')]


def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path)
    expect_cifar(monkeypatch, folder)
    check_config(config('CIFAR10', tmp_path))
    (folder / 'data_batch_4').unlink()
    message = complaint(config('CIFAR10', tmp_path))
    assert message == (
        "train_dataloader.dataset.data_root: there is no file '"
        f"{folder / 'data_batch_4'}'; prepare the data set with `tools/prepare_data.py cifar10 "
        f'--out {tmp_path}`, or say where it is with `--cfg-options data_root=DIR` or the '
        'environment variable CIFAR10_ROOT'
    )


def test_missing_root(tmp_path):
    gone = tmp_path / 'gone'
    for type_, command, variable in (
        ('CIFAR100', 'cifar100', 'CIFAR100_ROOT'),
        ('FashionMNIST', 'fashion-mnist', 'FASHION_MNIST_ROOT'),
    ):
        message = complaint(config(type_, gone))
        assert message == (
            f"train_dataloader.dataset.data_root: there is no folder '{gone}'; prepare the data "
            f'set with `tools/prepare_data.py {command} --out {gone}`, or say where it is with '
            f'`--cfg-options data_root=DIR` or the environment variable {variable}'
        )
    message = complaint(config('MNIST', gone))
    assert message.endswith(
        'put the data set there, or say where it is with `--cfg-options data_root=DIR`'
    )
    message = complaint(config('CIFAR100', '', data_prefix=str(gone)))
    assert message.startswith("train_dataloader.dataset.data_prefix: there is no folder '")


@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
def test_missing_cifar_file(cifar100, name):
    (cifar100 / name).unlink()
    message = complaint(config('CIFAR100', cifar100.parent))
    start = f"train_dataloader.dataset.data_root: there is no file '{cifar100 / name}'; prepare"
    assert message.startswith(start)


@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
@pytest.mark.parametrize('damage', ['truncated', 'changed'])
def test_damaged_cifar_file(cifar100, name, damage):
    path = cifar100 / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content if damage == 'changed' else content[:-10])
    expected = dict(CIFAR100.train_list + CIFAR100.test_list)
    expected['meta'] = CIFAR100.meta['md5']
    message = complaint(config('CIFAR100', cifar100.parent))
    assert message.startswith(f"train_dataloader.dataset.data_root: '{path}' has the MD5 ")
    assert f'instead of {expected[name]}, so it is incomplete, damaged' in message
    fix = f'delete it and run `tools/prepare_data.py cifar100 --out {cifar100.parent}`'
    assert message.endswith(fix)


def test_the_published_checksums_are_expected(tmp_path):
    write_cifar100(tmp_path)
    message = complaint(config('CIFAR100', tmp_path))
    assert 'instead of 16019d7e3df5f24257cddd939b257f8d' in message


def test_own_files_in_the_format_of_cifar(cifar100, monkeypatch):
    """A subclass says what it expects; None is MMPretrain's way not to expect anything."""

    class Ours(CIFAR100):
        base_folder = 'ours'
        train_list = [['training', None]]
        test_list = [['testing', '00000000000000000000000000000000']]
        meta = {'filename': 'names', 'key': 'fine_label_names'}

    folder = cifar100.rename(cifar100.with_name('ours'))
    for old, new in (('train', 'training'), ('test', 'testing'), ('meta', 'names')):
        (folder / old).rename(folder / new)
    message = complaint(config(Ours, folder.parent, num_classes=100))
    assert message.startswith(f"train_dataloader.dataset.data_root: '{folder / 'testing'}' has")
    assert message.endswith('damaged or something else: copy it again')
    monkeypatch.setattr(Ours, 'test_list', [['testing', None]])
    check_config(config(Ours, folder.parent, num_classes=100))


# --- idx files ----------------------------------------------------------------------------------


@pytest.mark.parametrize('type_', ['FashionMNIST', 'MNIST'])
def test_good_idx_files_pass_and_are_read_once(fashion, monkeypatch, type_):
    read = []
    read_idx = arrays.read_idx
    monkeypatch.setattr(
        arrays, 'read_idx', lambda path, *a: read.append(path) or read_idx(path, *a)
    )
    check_config(config(type_, fashion))
    assert sorted(read) == sorted(str(fashion / name) for names in SPLITS for name in names)


def test_missing_idx_file(fashion):
    path = fashion / 't10k-labels-idx1-ubyte'
    path.unlink()
    message = complaint(config('FashionMNIST', fashion))
    start = f"train_dataloader.dataset.data_root: there is no file '{path}'; prepare the data set"
    assert message.startswith(f'{start} with `tools/prepare_data.py fashion-mnist --out {fashion}`')


def test_gzipped_idx_files(tmp_path):
    write_fashion_mnist(tmp_path, gz=True)
    path = tmp_path / 'train-images-idx3-ubyte'
    start = f"train_dataloader.dataset.data_root: '{path}' is there only with .gz"
    message = complaint(config('FashionMNIST', tmp_path))
    assert message.startswith(start)
    assert message.endswith(
        f'run `tools/prepare_data.py fashion-mnist --out {tmp_path} --source {tmp_path}`'
    )
    message = complaint(config('MNIST', tmp_path))
    assert message.startswith(start)
    assert message.endswith(f'run `gunzip --keep {path}.gz`')


@pytest.mark.parametrize(
    ('name', 'change', 'problem'),
    [
        (
            'train-images-idx3-ubyte',
            lambda content: content[:-1],
            'holds 39199 values but its header promises 50 x 28 x 28',
        ),
        ('t10k-labels-idx1-ubyte', lambda content: content[:5], 'ends inside its header (5 bytes'),
        (
            't10k-labels-idx1-ubyte',
            lambda content: struct.pack('>I', 0x803) + content[4:],
            'starts with 0x00000803, not 0x00000801',
        ),
        (
            'train-labels-idx1-ubyte',
            lambda content: content[:-1] + bytes([10]),
            'holds the label 10, but the data set has 10 classes, labels 0 to 9',
        ),
        (
            'train-labels-idx1-ubyte',
            lambda content: content[:4] + struct.pack('>I', 49) + content[8:-1],
            'train-images-idx3-ubyte holds 50 images but',
        ),
    ],
)
def test_damaged_idx_file(fashion, name, change, problem):
    path = fashion / name
    path.write_bytes(change(path.read_bytes()))
    message = complaint(config('FashionMNIST', fashion))
    assert message.startswith(f'train_dataloader.dataset.data_root: {fashion}/')
    assert problem in message
    command = f'`tools/prepare_data.py fashion-mnist --out {fashion} --overwrite`'
    assert message.endswith(f': to replace it by the published data set run {command}')
    assert complaint(config('MNIST', fashion)).endswith(': copy it again')


def test_no_images(fashion):
    write_idx_pair(fashion, SPLITS[1], np.zeros((0, 28, 28)), np.zeros(0))
    message = complaint(config('FashionMNIST', fashion))
    path = fashion / 't10k-images-idx3-ubyte'
    assert message.startswith(f"train_dataloader.dataset.data_root: '{path}' holds no images")


def test_other_data_sets_in_the_idx_format(tmp_path):
    """Of any number of classes and size of the images."""
    rng = np.random.default_rng(0)
    for names in SPLITS:
        write_idx_pair(tmp_path, names, rng.integers(0, 256, (30, 8, 6)), np.arange(30) % 15)
    letters = tuple('abcdefghijklmno')
    message = complaint(config('FashionMNIST', tmp_path))
    assert 'holds the label 14, but the data set has 10 classes' in message
    check_config(config('FashionMNIST', tmp_path, 15, classes=letters))
    check_config(config('FashionMNIST', tmp_path, 15, metainfo=dict(classes=letters)))
    unnamed = type('Unnamed', (MNIST,), {'METAINFO': {}})
    check_config(config(unnamed, tmp_path, 15))


@pytest.mark.parametrize('type_', ['FashionMNIST', 'MNIST'])
@pytest.mark.parametrize('test_mode', [True, False])
def test_the_split_that_mmpretrain_would_read(fashion, type_, test_mode):
    """MMPretrain's own class, built with the options that are refused, reads the other split."""
    split = 'train' if test_mode else 'test'
    cls = {'FashionMNIST': FashionMNIST, 'MNIST': MNIST}[type_]
    options = dict(split=split, test_mode=test_mode)
    built = cls(str(fashion), download=False, **options)
    assert len(built) == (20 if test_mode else 50)

    message = complaint(config(type_, fashion, **options))
    assert message == (
        f"train_dataloader.dataset: split='{split}' with test_mode={test_mode} reads the "
        f'{"test" if test_mode else "training"} images, because MMPretrain chooses the files of '
        f'{type_} by test_mode: set train_dataloader.dataset.test_mode={not test_mode}'
    )


# --- all ----------------------------------------------------------------------------------------


def test_number_of_classes(cifar100, fashion):
    message = complaint(config('CIFAR100', cifar100.parent, num_classes=10))
    assert message.startswith(
        'model.head.num_classes is 10, but train_dataloader.dataset has 100 classes '
        "('apple', 'aquarium_fish', "
    )
    assert message.endswith('): set model.head.num_classes=100')
    message = complaint(config('FashionMNIST', fashion, num_classes=11))
    assert message.startswith('model.head.num_classes is 11, but train_dataloader.dataset has 10')
    # The data need not be there for it.
    message = complaint(config('CIFAR10', 'data/gone', num_classes=11, download=True))
    assert message.startswith('model.head.num_classes is 11, but train_dataloader.dataset has 10')


@pytest.mark.parametrize('type_', ['CIFAR100', 'FashionMNIST'])
def test_what_is_left_alone(tmp_path, type_):
    check_config(config(type_, tmp_path / 'gone', download=True))
    check_config(config(type_, 's3://bucket/folder'))
    check_config(config(type_, '', data_prefix='s3://bucket/folder'))


def test_a_class_that_reads_other_files_is_left_alone(tmp_path):
    class Ours(CIFAR100):
        def load_data_list(self):
            return []

    check_config(config(Ours, tmp_path, num_classes=100))


# --- Wrappers -----------------------------------------------------------------------------------


def test_rotated_pairs_have_classes_of_their_own(fashion):
    """The files are checked by the ten classes that they hold, the heads by the two of the task."""
    expert = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=2))
    cfg = config('FashionMNIST', fashion)
    cfg.model = dict(type='mmdet_moe.ClassifierMixture', expert=expert)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        pairs = dict(type='mmdet_moe.RotatedPairs', dataset=loader.dataset)
        loader.dataset = dict(type='RepeatDataset', times=2, dataset=pairs)
    check_config(cfg)
    cfg.model.expert.head.num_classes = 10
    assert complaint(cfg) == (
        'model.expert.head.num_classes is 10, but train_dataloader.dataset.dataset.dataset has 2 '
        "classes ('upright', 'rotated'): set model.expert.head.num_classes=2"
    )
    (fashion / SPLITS[0][1]).unlink()
    with pytest.raises(
        ConfigError, match=r'train_dataloader\.dataset\.dataset\.dataset\.data_root'
    ):
        check_config(cfg)
