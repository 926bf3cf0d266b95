"""Small grey images of one object each, which :mod:`~mmdet_moe.datasets.digit_scenes` pastes.

Two sources: scikit-learn's handwritten digits, which are inside its wheel, and Fashion-MNIST, read
from its four idx files on disk. Each gives a training and a validation set that share no image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdet_moe.datasets.fashion_mnist import CLASSES as FASHION_CLASSES
from mmdet_moe.datasets.idx import SPLITS, check_pair, find_idx, read_idx
from mmdet_moe.errors import ConfigError

DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
SOURCES = ('digits', 'fashion-mnist')

# One digit in five goes to validation. The file lists the writers one after the other, so taking
# the last fifth of every class, rather than every fifth digit, mostly gives validation new hands.
_DIGITS_PER_VAL_DIGIT = 5


@dataclass(frozen=True)
class SpriteSet:
    """The sprites of one split.

    Attributes:
        images: ``(N, H, W)`` uint8, 0 where there is no ink.
        labels: ``(N,)`` int64, indices into ``classes``.
        classes: names of the classes.
        ink: two intensities in 0..1. Ink starts to show at the first and is opaque from the second.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    ink: tuple[float, float]


def load_sprites(name: str, source: str | Path | None = None) -> dict[str, SpriteSet]:
    """Load a sprite source.

    Args:
        name: 'digits' or 'fashion-mnist'.
        source: folder of the idx files, for 'fashion-mnist' only.

    Returns:
        The sprites of the splits 'train' and 'val'.

    Raises:
        ConfigError: the name is unknown, ``source`` is missing or unneeded, or a file in it is
            missing or damaged.
    """
    if name == 'digits':
        if source is not None:
            raise ConfigError('source (--source) is only for fashion-mnist: leave it out')
        return load_digits()
    if name == 'fashion-mnist':
        if source is None:
            raise ConfigError(
                'the sprites fashion-mnist need source (--source): the folder that holds '
                'train-images-idx3-ubyte[.gz] and the other three idx files'
            )
        return load_fashion_mnist(source)
    raise ConfigError(f'sprites must be one of {", ".join(SOURCES)}, not {name!r}')


def load_digits() -> dict[str, SpriteSet]:
    """Load scikit-learn's 1,797 handwritten digits of 8x8 pixels, split class by class.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            'the sprites digits come from scikit-learn: install it with `pip install scikit-learn`'
        ) from error
    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    is_val = np.zeros(len(labels), bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        is_val[members[-(len(members) // _DIGITS_PER_VAL_DIGIT) :]] = True
    return {
        split: SpriteSet(images[chosen], labels[chosen], DIGIT_CLASSES, ink=(0.3, 0.6))
        for split, chosen in (('train', ~is_val), ('val', is_val))
    }


def load_fashion_mnist(source: str | Path) -> dict[str, SpriteSet]:
    """Load Fashion-MNIST: its training files are split 'train' and its t10k files split 'val'.

    Args:
        source: folder with the four idx files under their own names, plain or gzipped.

    Raises:
        ConfigError: a file is missing, damaged, or does not fit its partner.
    """
    return {
        split: _load_fashion_split(Path(source), *names)
        for split, names in zip(('train', 'val'), SPLITS, strict=True)
    }


def _load_fashion_split(source: Path, images_name: str, labels_name: str) -> SpriteSet:
    images_path = find_idx(source, images_name)
    labels_path = find_idx(source, labels_name)
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1).astype(np.int64)
    check_pair(images, labels, len(FASHION_CLASSES), images_path, labels_path)
    ink = (0.04, 0.6)
    has_ink = images.reshape(len(images), -1).max(axis=1, initial=0) >= 255 * ink[1]
    if not has_ink.any():
        raise ConfigError(f'{images_path} holds no image with anything to see in it')
    return SpriteSet(images[has_ink], labels[has_ink], FASHION_CLASSES, ink)


def digest(sprite_sets: dict[str, SpriteSet]) -> str:
    """Fingerprint of all sprites and labels, so that a changed source is noticed."""
    sha = hashlib.sha256()
    for split in sorted(sprite_sets):
        sprites = sprite_sets[split]
        sha.update(repr((split, sprites.images.shape, sprites.classes, sprites.ink)).encode())
        sha.update(np.ascontiguousarray(sprites.images).tobytes())
        sha.update(sprites.labels.astype('<i8').tobytes())
    return sha.hexdigest()[:16]
