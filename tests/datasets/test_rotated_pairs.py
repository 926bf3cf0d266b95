"""Rotated pairs against a rotation by hand; nothing but the content tells the versions apart."""

import cv2
import numpy as np
import pytest
import torch
from miniature import expect_cifar, write_cifar10, write_fashion_mnist
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets import CIFAR10, FashionMNIST
from scipy import ndimage

from mmdet_moe.datasets.rotated_pairs import rotated_square
from mmdet_moe.errors import ConfigError
from research.checks import rotation_traces

PACK = [dict(type='PackInputs', algorithm_keys=('cluster',))]


def by_hand(image, angle, rotate, blur):
    """The same square with OpenCV, in coordinates from the middle, x to the right and y up."""
    height, width = image.shape[:2]
    theta = np.deg2rad(angle)
    side = (min(height, width) - 1 - 4 * blur) / (abs(np.sin(theta)) + abs(np.cos(theta)))
    x = np.linspace(-side / 2, side / 2, width)[None, :]
    y = np.linspace(side / 2, -side / 2, height)[:, None]
    z = x + 1j * y
    if rotate:  # what has been turned counter-clockwise was clockwise of here before
        z = z * np.exp(-1j * theta)
    rows, columns = (height - 1) / 2 - z.imag, (width - 1) / 2 + z.real
    for places, length in ((rows, height), (columns, width)):
        assert places.min() > 2 * blur - 1e-9
        assert places.max() < length - 1 - 2 * blur + 1e-9
    exact = image.astype(np.float32)
    if blur:
        exact = cv2.GaussianBlur(exact, (0, 0), blur, borderType=cv2.BORDER_REFLECT_101)
    places = columns.astype(np.float32), rows.astype(np.float32)
    return cv2.remap(exact, *places, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101).reshape(
        image.shape
    )


def smooth(shape, seed=0, sigma=3):
    """uint8 noise of the same look in all directions and at all places, up to its borders."""
    margin = 4 * sigma
    padded = (shape[0] + 2 * margin, shape[1] + 2 * margin, *shape[2:])
    noise = np.random.default_rng(seed).normal(size=padded)
    noise = ndimage.gaussian_filter(noise, sigma=(sigma, sigma, *(0,) * (len(shape) - 2)))
    noise = noise[margin:-margin, margin:-margin] * 2 * sigma * np.pi**0.5  # variance 1
    return (128 + 40 * noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('shape', [(28, 28), (32, 32, 3), (28, 28, 1), (21, 40)])
@pytest.mark.parametrize('angle', [30, -75.5, 90, 200])
@pytest.mark.parametrize('blur', [0, 1.5])
def test_against_opencv(shape, angle, blur):
    image = smooth(shape)
    for rotate in (False, True):
        shown = rotated_square(image, angle, rotate, blur)
        assert (shown.shape, shown.dtype) == (shape, np.uint8)
        # OpenCV rounds places to 1/32 of a pixel, and values to whole numbers.
        np.testing.assert_allclose(shown, by_hand(image, angle, rotate, blur), rtol=0, atol=3)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'float32', 'float64'])
@pytest.mark.parametrize('channels', [1, 2, 4])
def test_types_and_channels(dtype, channels):
    image = smooth((12, 12, channels)).astype(dtype)
    shown = rotated_square(image, 30, rotate=True)
    assert (shown.shape, shown.dtype) == (image.shape, image.dtype)
    np.testing.assert_allclose(shown, by_hand(image, 30, rotate=True, blur=1.0), rtol=0, atol=3)


@pytest.mark.parametrize(
    ('image', 'found'),
    [
        (np.ones((9, 9), bool), r'bool \(9, 9\)'),
        (np.ones((9, 9, 3), complex), r'complex128 \(9, 9, 3\)'),
        (np.ones((0, 9), np.uint8), r'uint8 \(0, 9\)'),
        (np.ones(9, np.uint8), r'uint8 \(9,\)'),
        (torch.ones(9, 9), 'Tensor'),
    ],
)
def test_images_that_cannot_be_rotated(image, found):
    with pytest.raises(ConfigError, match=f'got .*{found}.*; convert them in dataset.pipeline'):
        rotated_square(image, 30, rotate=True)


def test_images_that_are_too_small():
    with pytest.raises(ConfigError, match=r'image of 5×9 pixels nothing is left with blur=1\.5'):
        rotated_square(np.ones((5, 9)), 30, rotate=False, blur=1.5)


def test_direction_and_quarter_turns():
    """A quarter turn needs no interpolation and, without a blur, cuts nothing off."""
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 5), dtype=np.uint8)
    for angle, turns in ((90, 1), (-90, -1)):
        np.testing.assert_array_equal(rotated_square(image, angle, False, blur=0), image)
        turned = rotated_square(image, angle, True, blur=0)
        np.testing.assert_array_equal(turned, np.rot90(image, turns))


def test_images_without_a_direction_look_alike():
    """An image without content gives no version away, nor does one that is round."""
    plain = np.full((28, 28), 200, np.uint8)
    assert (rotated_square(plain, 30, rotate=True) == 200).all()
    y, x = np.mgrid[:28, :28] - 13.5
    rings = (128 + 100 * np.cos(np.hypot(x, y) / 4)).astype(np.uint8)
    upright, rotated = (rotated_square(rings, 30, rotate).astype(int) for rotate in (False, True))
    assert np.abs(upright - rotated).max() <= 1


def accuracy_of_a_probe(images, labels):
    """Of a linear classifier that sees the border alone, on the half it was not fitted to.

    It sees the pixels of a frame of width 2, and how strong and how rough the frame is.
    """
    x = images.astype(float) / 128 - 1
    inner = np.zeros(images.shape[1:], bool)
    inner[2:-2, 2:-2] = True
    frame = x[:, ~inner]
    along, across = np.diff(x, axis=2), np.diff(x, axis=1)
    steps = [along[:, 0], along[:, -1], across[:, :, 0], across[:, :, -1]]
    look = [(frame**2).mean(1), frame.min(1), frame.max(1)]
    look += [(np.concatenate(steps, axis=1) ** 2).mean(1), np.ones(len(x))]
    features = np.column_stack([frame, *look])
    half = len(features) // 2
    coefficients, *_ = np.linalg.lstsq(features[:half], 2.0 * labels[:half] - 1, rcond=1e-3)
    return ((features[half:] @ coefficients > 0) == labels[half:]).mean()


def test_border_alone_does_not_tell():
    """On noise that looks the same in all directions there is nothing else to go by."""
    originals = [smooth((28, 28), seed, sigma=2) for seed in range(1000)]
    labels = np.arange(2 * len(originals)) % 2
    shown = np.stack([rotated_square(image, 30, r) for image in originals for r in (False, True)])
    # Four standard deviations of the share of right answers by chance.
    assert accuracy_of_a_probe(shown, labels) < 0.5 + 4 * 0.5 / len(originals) ** 0.5
    black = [
        ndimage.rotate(image, 30 * r, reshape=False, order=1)
        for image in originals[:300]
        for r in (False, True)
    ]
    assert accuracy_of_a_probe(np.stack(black), labels[: len(black)]) > 0.95


def accuracy_of_a_probe_of_details(images, labels):
    """Of a linear classifier that sees how rough each part is, on a fifth it was not fitted to."""
    x = images.astype(float)
    features = []
    for along, across in (
        ([1, -2, 1], [1, -2, 1]),
        ([1, -2, 1], [0, 1, 0]),
        ([0, 1, 0], [1, -2, 1]),
    ):
        detail = ndimage.convolve(x, np.outer(along, across)[None]) ** 2
        size = images.shape[1] // 8
        parts = detail.reshape(len(x), 8, size, 8, size).mean((2, 4)).reshape(len(x), -1)
        features.append(np.log(np.column_stack([parts, parts.mean(1)]) + 0.01))
    features = np.column_stack([*features, np.ones(len(x))])
    train = len(x) // 5 * 4
    coefficients, *_ = np.linalg.lstsq(features[:train], 2.0 * labels[:train] - 1, rcond=1e-6)
    return ((features[train:] @ coefficients > 0) == labels[train:]).mean()


def test_details_do_not_tell():
    """Traces of the interpolation do, where nothing is blurred before."""
    originals = rotation_traces.noise_without_direction(1500)
    labels = np.arange(2 * len(originals)) % 2
    by_blur = {blur: rotation_traces.pairs(originals, blur) for blur in (0.0, 1.0)}
    chance = 0.5 / 300**0.5  # of the 300 pairs that it was not fitted to
    assert accuracy_of_a_probe_of_details(by_blur[0.0], labels) > 0.5 + 4 * chance
    assert accuracy_of_a_probe_of_details(by_blur[1.0], labels) < 0.5 + 2 * chance


def test_a_network_finds_what_there_is():
    """So that one that finds nothing says something."""
    plain = rotation_traces.noise_without_direction(300)
    shown = rotation_traces.pairs(plain, 1.0)
    shown[1::2, 10:20, 10:20] = 255
    assert rotation_traces.accuracy(shown) > 0.9


@pytest.fixture(params=['cifar10', 'fashion_mnist'])
def source(request, tmp_path, monkeypatch):
    """Config of a data set, its images and its classes."""
    init_default_scope('mmpretrain')
    if request.param == 'cifar10':
        expect_cifar(monkeypatch, write_cifar10(tmp_path, num_train=10, num_test=20))
        config = dict(type='CIFAR10')
        data = CIFAR10(str(tmp_path), 'test', download=False)
    else:
        write_fashion_mnist(tmp_path, num_train=10, num_test=20)
        config = dict(type='FashionMNIST')
        data = FashionMNIST(str(tmp_path), 'test', download=False, test_mode=True)
    config |= dict(data_root=str(tmp_path), split='test', download=False, test_mode=True)
    infos = [data.get_data_info(i) for i in range(len(data))]
    return config, [i['img'] for i in infos], [int(i['gt_label']) for i in infos]


def pairs(config, augmentations=(), pipeline=(), **options):
    return DATASETS.build(
        dict(
            type='mmdet_moe.RotatedPairs',
            dataset=dict(**config, pipeline=list(augmentations)),
            pipeline=list(pipeline),
            **options,
        )
    )


def test_every_image_in_both_versions(source):
    config, images, classes = source
    data = pairs(config)
    assert len(data) == 40
    assert data.metainfo['classes'] == ('upright', 'rotated')
    assert len(data.metainfo['clusters']) == 10
    for i, (image, cluster) in enumerate(zip(images, classes, strict=True)):
        for label in (0, 1):
            sample = data[2 * i + label]
            assert (sample['gt_label'], sample['cluster']) == (label, cluster)
            assert sample['sample_idx'] == 2 * i + label
            # Which is right by the tests above.
            expected = rotated_square(image, 30, label == 1, blur=1.0)
            np.testing.assert_array_equal(sample['img'], expected)
            info = data.get_data_info(2 * i + label)
            np.testing.assert_array_equal(info['img'], sample['img'])
            assert (info['gt_label'], info['cluster']) == (label, cluster)
    assert np.array_equal(data[-1]['img'], data[39]['img'])
    with pytest.raises(IndexError, match='index 40 is out of range for 40 samples'):
        data[40]


def test_augmentation_comes_before_the_rotation(source):
    config, images, _ = source
    flip = dict(type='RandomFlip', prob=1.0, direction='horizontal')
    data = pairs(config, [flip], angle=-20)
    expected = rotated_square(np.flip(images[3], 1), -20, rotate=True, blur=1.0)
    np.testing.assert_array_equal(data[7]['img'], expected)
    # What is known of the sample is without it.
    expected = rotated_square(images[3], -20, rotate=True, blur=1.0)
    np.testing.assert_array_equal(data.get_data_info(7)['img'], expected)


def test_batches(source):
    """As the runner loads them, with a part of the images only."""
    config, images, classes = source
    data = pairs({**config, 'indices': 7}, pipeline=PACK)
    loader = Runner.build_dataloader(
        dict(
            dataset=data,
            batch_size=14,
            num_workers=0,
            sampler=DefaultSampler(data, shuffle=True, seed=1),
            collate_fn=dict(type='default_collate'),
        )
    )
    (batch,) = loader
    channels = 1 if images[0].ndim == 2 else 3
    assert batch['inputs'].shape == (14, channels, *images[0].shape[:2])
    assert batch['inputs'].dtype == torch.uint8
    found = [(int(s.gt_label), s.cluster) for s in batch['data_samples']]
    assert sorted(found) == sorted((label, c) for c in classes[:7] for label in (0, 1))
    assert [s.sample_idx % 2 for s in batch['data_samples']] == [label for label, _ in found]


@pytest.mark.parametrize(
    ('angle', 'message'),
    [
        (0, 'angle=0 leaves upright and rotated images alike'),
        (-720.0, 'angle=-720.0 leaves upright'),
        (float('nan'), 'angle=nan leaves'),
        ('30', "angle='30' must be a number of degrees"),
        (True, 'angle=True must be a number of degrees'),
    ],
)
def test_angle_is_refused(source, angle, message):
    with pytest.raises(ConfigError, match=message):
        pairs(source[0], angle=angle)


@pytest.mark.parametrize('blur', [-1, 'some', None])
def test_blur_is_refused(source, blur):
    with pytest.raises(ConfigError, match=f'blur={blur!r} must be a finite number of at least 0'):
        pairs(source[0], blur=blur)


def test_packed_too_early(source):
    config = source[0]
    data = pairs(config, PACK, PACK)
    with pytest.raises(ConfigError, match=r'move PackInputs to the pipeline of RotatedPairs$'):
        data[0]


def test_several_labels(source):
    data = pairs(source[0])
    data.dataset.get_data_info = lambda _: {'img': None, 'gt_label': [1, 2]}
    with pytest.raises(ConfigError, match=r'needs one gt_label for every image, .* has 2; use'):
        data.get_data_info(0)
