"""Small grey images of one object each, which :mod:`~mmdet_moe.datasets.digit_scenes` pastes.

Two sources: scikit-learn's handwritten digits, which are inside its wheel, and Fashion-MNIST, read
from its four idx files on disk. Each gives a training and a validation set that share no image.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdet_moe.errors import ConfigError

DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
FASHION_CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
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
        'train': _load_fashion_split(Path(source), 'train'),
        'val': _load_fashion_split(Path(source), 't10k'),
    }


def _load_fashion_split(source: Path, prefix: str) -> SpriteSet:
    images_path = _find_idx(source, f'{prefix}-images-idx3-ubyte')
    labels_path = _find_idx(source, f'{prefix}-labels-idx1-ubyte')
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1).astype(np.int64)
    if len(images) != len(labels):
        raise ConfigError(
            f'{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} '
            'labels: the two files do not belong together'
        )
    if len(labels) and labels.max() >= len(FASHION_CLASSES):
        raise ConfigError(
            f'{labels_path} holds the label {labels.max()}, and Fashion-MNIST has labels 0 to 9: '
            'this is another data set'
        )
    ink = (0.04, 0.6)
    has_ink = images.reshape(len(images), -1).max(axis=1, initial=0) >= 255 * ink[1]
    if not has_ink.any():
        raise ConfigError(f'{images_path} holds no image with anything to see in it')
    return SpriteSet(images[has_ink], labels[has_ink], FASHION_CLASSES, ink)


def _find_idx(source: Path, name: str) -> Path:
    for path in (source / name, source / f'{name}.gz'):
        if path.is_file():
            return path
    raise ConfigError(f'{source / name} (or the same with .gz) does not exist: put it there')


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or (by its name's ``.gz``) gzipped.

    Args:
        path: the file.
        ndim: the number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array with ``ndim`` dimensions.

    Raises:
        ConfigError: the file cannot be read, its magic number is not that of ``ndim`` dimensions of
            unsigned bytes, or its length is not the one that its header promises.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f'{path} cannot be read ({error}): download it again') from error
    header_bytes = 4 + 4 * ndim
    if len(data) < header_bytes:
        raise ConfigError(
            f'{path} ends inside its header ({len(data)} bytes, header {header_bytes}): '
            'download it again'
        )
    magic, *shape = struct.unpack(f'>{1 + ndim}I', data[:header_bytes])
    # 0x08 is the idx code for unsigned bytes; the low byte is the number of dimensions.
    expected_magic = 0x0800 | ndim
    if magic != expected_magic:
        raise ConfigError(
            f'{path} starts with {magic:#010x}, not {expected_magic:#010x}: '
            f'it is no idx file of unsigned bytes in {ndim} dimension(s)'
        )
    values = len(data) - header_bytes
    # Python integers: a damaged header's product can exceed 64 bits.
    promised = 1
    for length in shape:
        promised *= length
    if values != promised:
        raise ConfigError(
            f'{path} holds {values} values but its header promises '
            f'{" x ".join(map(str, shape))}: download it again'
        )
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


def digest(sprite_sets: dict[str, SpriteSet]) -> str:
    """Fingerprint of all sprites and labels, so that a changed source is noticed."""
    sha = hashlib.sha256()
    for split in sorted(sprite_sets):
        sprites = sprite_sets[split]
        sha.update(repr((split, sprites.images.shape, sprites.classes, sprites.ink)).encode())
        sha.update(np.ascontiguousarray(sprites.images).tobytes())
        sha.update(sprites.labels.astype('<i8').tobytes())
    return sha.hexdigest()[:16]
