"""Small data sets in the file formats of CIFAR-10, CIFAR-100 and Fashion-MNIST.

``write_*`` write one as it lies on disk when it is prepared, :func:`pack` makes the archive that a
server has of it, and ``expect_*`` make MMPretrain's classes and our downloads take it for the
published one. Every class has a coarse pattern of its own under noise, the same in both splits, so
that a small model can learn it. The labels go round the classes: the first ``num_classes`` images
of a split show every class once.
"""

import gzip
import hashlib
import json
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from mmpretrain.datasets import CIFAR10, CIFAR100

from mmdet_moe.datasets import download, fashion_mnist, idx
from mmdet_moe.datasets.class_folders import NOTE

_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100, 'fashion-mnist': 10}
_CIFAR = {
    cls.base_folder: (name, cls) for name, cls in (('cifar10', CIFAR10), ('cifar100', CIFAR100))
}

# CIFAR-100's super-classes in the order of their labels, as its file meta names them, and the label
# of each class's, as the published archive has them.
COARSE_NAMES = [
    'aquatic_mammals', 'fish', 'flowers', 'food_containers', 'fruit_and_vegetables',
    'household_electrical_devices', 'household_furniture', 'insects', 'large_carnivores',
    'large_man-made_outdoor_things', 'large_natural_outdoor_scenes',
    'large_omnivores_and_herbivores', 'medium_mammals', 'non-insect_invertebrates', 'people',
    'reptiles', 'small_mammals', 'trees', 'vehicles_1', 'vehicles_2',
]  # fmt: skip
COARSE_LABELS = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip


def write_cifar100(root, num_train=200, num_test=100, seed=0):
    """Write ``root/cifar-100-python`` with the files train, test and meta; return that folder."""
    folder = Path(root, CIFAR100.base_folder)
    folder.mkdir(parents=True, exist_ok=True)
    fine_names = list(CIFAR100.METAINFO['classes'])
    for split, title, count in (('train', 'training', num_train), ('test', 'testing', num_test)):
        images, labels = _images(count, (3, 32, 32), len(fine_names), seed, split)
        content = {
            'filenames': [f'{fine_names[label]}_s_{i:06d}.png' for i, label in enumerate(labels)],
            'batch_label': f'{title} batch 1 of 1',
            'fine_labels': labels,
            'coarse_labels': [COARSE_LABELS[label] for label in labels],
            'data': images.reshape(count, -1),
        }
        _dump(content, folder / split)
    meta = {'fine_label_names': fine_names, 'coarse_label_names': COARSE_NAMES}
    _dump(meta, folder / 'meta')
    return folder


def write_cifar10(root, num_train=50, num_test=20, seed=0):
    """Write ``root/cifar-10-batches-py``, the training images in five batches; return it."""
    folder = Path(root, CIFAR10.base_folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(CIFAR10.METAINFO['classes'])
    for split, count in (('train', num_train), ('test', num_test)):
        images, labels = _images(count, (3, 32, 32), len(names), seed, split)
        num_batches = 5 if split == 'train' else 1
        for batch, chosen in enumerate(np.array_split(np.arange(count), num_batches), start=1):
            content = {
                'batch_label': f'{split}ing batch {batch} of {num_batches}',
                'labels': [labels[i] for i in chosen],
                'data': images[chosen].reshape(len(chosen), -1),
                'filenames': [f'{names[labels[i]]}_s_{i:06d}.png' for i in chosen],
            }
            _dump(content, folder / (f'data_batch_{batch}' if split == 'train' else 'test_batch'))
    meta = {'num_cases_per_batch': num_train // 5, 'label_names': names, 'num_vis': 3072}
    _dump(meta, folder / 'batches.meta')
    return folder


def write_fashion_mnist(root, num_train=50, num_test=20, seed=0, gz=False):
    """Write the four idx files into ``root``, plain or all with ``.gz``; return it."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for split, count, names in zip(
        ('train', 'test'), (num_train, num_test), idx.SPLITS, strict=True
    ):
        images, labels = _images(count, (28, 28), _NUM_CLASSES['fashion-mnist'], seed, split)
        write_idx_pair(root, names, images, labels, gz)
    return root


def write_idx_pair(root, names, images, labels, gz=False):
    """Write images ``(N, H, W)`` and labels ``(N,)`` under their two names."""
    for name, values in zip(names, (images, np.asarray(labels)), strict=True):
        content = struct.pack(f'>{1 + values.ndim}I', 0x0800 | values.ndim, *values.shape)
        content += values.astype(np.uint8).tobytes()
        if gz:
            (root / f'{name}.gz').write_bytes(gzip.compress(content, mtime=0))
        else:
            (root / name).write_bytes(content)


def pack(folder):
    """Pack a folder of CIFAR files into ``.tar.gz`` beside it, under the published name."""
    folder = Path(folder)
    _, cls = _CIFAR[folder.name]
    path = folder.with_name(cls.filename)
    with tarfile.open(path, 'w:gz') as archive:
        archive.add(folder, folder.name)
    return path


def expect_cifar(monkeypatch, folder, archive=None):
    """Make the checksums of a written CIFAR folder, and of its archive, the expected ones."""
    folder = Path(folder)
    name, cls = _CIFAR[folder.name]
    for list_name in ('train_list', 'test_list'):
        files = [[file, _md5(folder / file)] for file, _ in getattr(cls, list_name)]
        monkeypatch.setattr(cls, list_name, files)
    monkeypatch.setattr(cls, 'meta', cls.meta | {'md5': _md5(folder / cls.meta['filename'])})
    published = download.CIFAR[name]
    provides = {path: _md5(folder.parent / path) for path in published.provides}
    published = replace(published, provides=provides)
    if archive is not None:
        published = _describe(published, archive)
    monkeypatch.setitem(download.CIFAR, name, published)


def note_checksums(folder):
    """Note the checksums of a written CIFAR folder in it, for processes of their own."""
    sums = {path.name: _md5(path) for path in Path(folder).iterdir()}
    Path(folder, NOTE).write_text(json.dumps(sums))


def expect_fashion_mnist(monkeypatch, root):
    """Make the checksums of the written idx files, plain or with ``.gz``, the expected ones."""
    for name in fashion_mnist.CONTENT_MD5:
        path = idx.find_idx(root, name)
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        digest = hashlib.md5(content).hexdigest()
        monkeypatch.setitem(fashion_mnist.CONTENT_MD5, name, digest)
        if path.suffix == '.gz':
            archive = _describe(fashion_mnist.ARCHIVES[name], path)
            monkeypatch.setitem(fashion_mnist.ARCHIVES, name, archive)


def _describe(published, file):
    size = file.stat().st_size
    return replace(published, md5=_md5(file), num_bytes=size, unpacked_bytes=size)


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def _images(count, shape, num_classes, seed, split):
    """Images ``(count, *shape)`` uint8 of blocks in the colours of their class, and labels."""
    cells = 4
    patterns = np.random.default_rng(seed).integers(
        0, 256, (num_classes, *shape[:-2], cells, cells)
    )
    noise = np.random.default_rng((seed, split == 'test'))
    labels = np.arange(count) % num_classes
    blocks = np.ones((shape[-2] // cells, shape[-1] // cells))
    images = np.kron(patterns[labels], blocks) + noise.normal(0, 30, (count, *shape))
    return images.clip(0, 255).astype(np.uint8), labels.tolist()


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, as in the published files.

    With ``encoding='latin1'`` they are read as text, with ``encoding='bytes'`` as bytes.
    """

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value_bytes = value if isinstance(value, bytes) else value.encode('latin1')
        self.write(pickle.BINSTRING + struct.pack('<i', len(value_bytes)) + value_bytes)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def _dump(content, path):
    with path.open('wb') as file:
        _Python2Pickler(file, protocol=2).dump(content)
