"""CIFAR made of a folder of images for each class."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from mmdet_moe.datasets import class_folders
from mmdet_moe.datasets.class_folders import NOTE, PUBLISHED, checksums, prepare_from_classes
from mmdet_moe.engine.preflight import datasets as preflight_datasets
from mmdet_moe.engine.preflight.arrays import check_arrays
from mmdet_moe.errors import ConfigError

PER_CLASS = {'train': 2, 'test': 1}


@pytest.fixture(params=['cifar10', 'cifar100'])
def name(request):
    return request.param


@pytest.fixture
def source(tmp_path, name, monkeypatch):
    """Images of random colours; what is published is said to be of them."""
    rng = np.random.default_rng(0)
    published, folder, pixels = PUBLISHED[name], tmp_path / 'images', []
    for split, count in PER_CLASS.items():
        for label in published.classes:
            of_class = folder / split / label
            of_class.mkdir(parents=True)
            for index in range(count if (name, split) != ('cifar10', 'train') else 5):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(image).save(of_class / f'{label}_s_{index:06d}.png')
                if split == 'train':
                    pixels.append(image)
    per_class = PER_CLASS | ({'train': 5} if name == 'cifar10' else {})
    means = tuple(np.mean(pixels, axis=(0, 1, 2)))
    changed = replace(published, per_class=per_class, means=means)
    monkeypatch.setitem(class_folders.PUBLISHED, name, changed)
    return folder


def built(name, out, split, own=True):
    kind = f'{"mmdet_moe" if own else "mmpretrain"}.{name.upper()}'
    return DATASETS.build(
        dict(type=kind, data_root=str(out), split=split, download=False, test_mode=split == 'test')
    )


@pytest.mark.parametrize('split', PER_CLASS)
def test_the_data_set_has_the_pixels_and_labels_of_the_files(name, source, tmp_path, split):
    pytest.importorskip('mmpretrain')
    counts = prepare_from_classes(name, source, tmp_path / 'out')
    dataset = built(name, tmp_path / 'out', split)
    assert len(dataset) == counts[split] == sum(1 for _ in source.glob(f'{split}/*/*.png'))
    classes = dataset.metainfo['classes']
    assert tuple(classes) == PUBLISHED[name].classes
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        # Round the classes: the first images show each once.
        label = index % len(classes)
        assert info['gt_label'] == label
        files = sorted((source / split / classes[label]).iterdir())
        assert np.array_equal(info['img'], np.asarray(Image.open(files[index // len(classes)])))


def test_again(name, source, tmp_path):
    out = tmp_path / 'out'
    prepare_from_classes(name, source, out)
    assert prepare_from_classes(name, source, out) is None
    folder = out / PUBLISHED[name].folder
    damaged = folder / PUBLISHED[name].files['test'][0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f'{damaged.name} is missing or damaged: delete'):
        prepare_from_classes(name, source, out)


def test_class_names_are_those_of_mmpretrain():
    categories = pytest.importorskip('mmpretrain.datasets.categories')
    assert PUBLISHED['cifar10'].classes == tuple(categories.CIFAR10_CATEGORIES)
    assert PUBLISHED['cifar100'].classes == tuple(categories.CIFAR100_CATEGORIES)


def test_preflight(name, source, tmp_path):
    """Damage is found by the note; MMPretrain's own class is told that it cannot read this."""
    cifar = pytest.importorskip('mmdet_moe.datasets.cifar')
    out = tmp_path / 'out'
    prepare_from_classes(name, source, out)
    cfg = dict(data_root=str(out), split='train', download=False)

    def check(cls):
        check_arrays(preflight_datasets.Dataset('train', cfg, cls), set())

    own = getattr(cifar, name.upper())
    check(own)
    published = getattr(cifar, f'Published{name.upper()}')
    with pytest.raises(ConfigError, match=rf"set train\.type='mmdet_moe\.{name.upper()}'"):
        check(published)
    folder = out / own.base_folder
    file = folder / own.train_list[0][0]
    file.write_bytes(b'x')
    with pytest.raises(
        ConfigError, match=f'has the MD5 .* instead of {checksums(folder)[file.name]}'
    ):
        check(own)


def save_all(source, suffix, **options):
    for path in source.glob('*/*/*.png'):
        image = Image.open(path)
        path.unlink()
        image.save(path.with_suffix(suffix), **options)


def a_file(source, name):
    return next((source / 'train' / PUBLISHED[name].classes[3]).iterdir())


def another_size(source, name):
    Image.new('RGB', (32, 31)).save(a_file(source, name))


SPOILED = {
    'is stored as JPEG, which changes pixels': lambda source, _: save_all(source, '.jpg'),
    r'is stored as JPEG': lambda source, _: save_all(source, '.png', format='JPEG'),
    "there is no folder 'test' in it": lambda source, _: (source / 'test').rename(source / 'val'),
    r"lacks the class '\w+': it needs one folder for each of the": lambda source, name: a_file(
        source, name
    ).parent.rename(source / 'elsewhere'),
    "has an unknown class 'zebra'": lambda source, _: (source / 'train' / 'zebra').mkdir(),
    r'holds \d files and not the \d images': lambda source, name: a_file(source, name).unlink(),
    'has 32×31 pixels, not 32×32': another_size,
    'cannot be read as an image': lambda source, name: a_file(source, name).write_bytes(b'no'),
    'mean colour is .* they are not the pixels of cifar': lambda source, name: Image.new(
        'RGB', (32, 32)
    ).save(a_file(source, name)),
}


@pytest.mark.parametrize('message', SPOILED)
def test_what_is_wrong(name, source, tmp_path, message):
    SPOILED[message](source, name)
    with pytest.raises(ConfigError, match=message):
        prepare_from_classes(name, source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_what_is_there_is_something_else(name, source, tmp_path):
    folder = tmp_path / 'out' / PUBLISHED[name].folder
    folder.mkdir(parents=True)
    (folder / PUBLISHED[name].files['test'][0]).write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match='is incomplete, damaged or something else'):
        prepare_from_classes(name, source, tmp_path / 'out')
    assert not (folder / NOTE).exists()


def test_the_means_are_those_that_others_found():
    """To five decimals of the shares of 255."""
    found = {'cifar10': (0.49140, 0.48216, 0.44653), 'cifar100': (0.50708, 0.48655, 0.44092)}
    for name, shares in found.items():
        np.testing.assert_allclose(PUBLISHED[name].means, 255 * np.array(shares), atol=2e-3, rtol=0)
