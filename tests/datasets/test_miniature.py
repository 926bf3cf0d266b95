"""The miniatures are what they stand for."""

import pickle

import numpy as np
import pytest
from miniature import expect_cifar, write_cifar10, write_cifar100, write_fashion_mnist
from mmpretrain.datasets import CIFAR10, CIFAR100, FashionMNIST


@pytest.mark.parametrize('encoding', ['latin1', 'bytes'])
def test_cifar100_has_the_keys_of_the_published_files(tmp_path, encoding):
    folder = write_cifar100(tmp_path, num_train=130, num_test=100)

    def text(value):
        return value.encode() if encoding == 'bytes' else value

    def read(name):
        content = (folder / name).read_bytes()
        assert content[:2] == b'\x80\x02'  # protocol 2
        return pickle.loads(content, encoding=encoding)

    train = read('train')
    assert set(train) == {
        text(key) for key in ('filenames', 'batch_label', 'fine_labels', 'coarse_labels', 'data')
    }
    assert train[text('batch_label')] == text('training batch 1 of 1')
    assert train[text('data')].shape == (130, 3072)
    assert train[text('data')].dtype == np.uint8
    assert read('test')[text('data')].shape == (100, 3072)
    meta = read('meta')
    fine, coarse = meta[text('fine_label_names')], meta[text('coarse_label_names')]
    assert [text(name) for name in CIFAR100.METAINFO['classes']] == fine
    # Two of the published pairs, from the data set's own page.
    group_of = {
        fine[i]: coarse[j]
        for i, j in zip(train[text('fine_labels')], train[text('coarse_labels')], strict=True)
    }
    assert group_of[text('maple_tree')] == text('trees')
    assert group_of[text('aquarium_fish')] == text('fish')


def nearest_mean_accuracy(train, test):
    """Accuracy of the class whose mean training image is the nearest."""

    def arrays(data):
        infos = [data.get_data_info(i) for i in range(len(data))]
        images = np.stack([info['img'].astype(np.float64).ravel() for info in infos])
        return images, np.array([int(info['gt_label']) for info in infos])

    images, labels = arrays(train)
    classes = np.unique(labels)
    means = np.stack([images[labels == c].mean(axis=0) for c in classes])
    images, labels = arrays(test)
    # Squared distances, less the square of the image, which is the same for every class.
    distances = (means**2).sum(axis=1) - 2 * images @ means.T
    return (classes[distances.argmin(axis=1)] == labels).mean()


@pytest.mark.parametrize(
    ('write', 'cls'),
    [(write_cifar10, CIFAR10), (write_cifar100, CIFAR100), (write_fashion_mnist, FashionMNIST)],
)
def test_mmpretrain_reads_classes_that_can_be_told_apart(tmp_path, monkeypatch, write, cls):
    folder = write(tmp_path)
    if cls is not FashionMNIST:
        expect_cifar(monkeypatch, folder)
    train, test = (
        cls(str(tmp_path), split=split, test_mode=split == 'test', download=False)
        for split in ('train', 'test')
    )
    assert len(train) > len(test)
    assert nearest_mean_accuracy(train, test) > 0.9
