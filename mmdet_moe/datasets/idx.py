"""The idx format of MNIST and of the data sets that took it over, such as Fashion-MNIST.

A file is a magic number (two zero bytes, a code for the type, the number of dimensions), the
dimensions as big-endian 32-bit integers, and the values. A split is a pair of files: images
``(N, H, W)`` and labels ``(N,)``, both of unsigned bytes. Every complaint is one sentence that ends
in ``fix``, what the user should do.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from mmdet_moe.errors import ConfigError

#: File names of the training split and of the test split: the images, then the labels.
SPLITS = tuple(
    (f'{prefix}-images-idx3-ubyte', f'{prefix}-labels-idx1-ubyte') for prefix in ('train', 't10k')
)
_DOWNLOAD_AGAIN = 'download it again'


def find_idx(folder: str | Path, name: str) -> Path:
    """Path of an idx file in a folder, which may be gzipped there.

    Raises:
        ConfigError: it is there neither plain nor with ``.gz``.
    """
    for path in (Path(folder, name), Path(folder, f'{name}.gz')):
        if path.is_file():
            return path
    raise ConfigError(f'{Path(folder, name)} (or the same with .gz) does not exist: put it there')


def read_content(path: str | Path, fix: str = _DOWNLOAD_AGAIN) -> bytes:
    """Content of a file, uncompressed if its name ends in ``.gz``.

    Raises:
        ConfigError: it cannot be read or is no complete gzip file.
    """
    path = Path(path)
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f'{path} cannot be read ({error}): {fix}') from error


def parse_idx(
    content: bytes, ndim: int, path: str | Path, fix: str = _DOWNLOAD_AGAIN
) -> np.ndarray:
    """Array of the content of an idx file of unsigned bytes.

    Args:
        content: the uncompressed bytes.
        ndim: the number of dimensions it must have: 3 for images, 1 for labels.
        path: what to call the file in a complaint.
        fix: how a complaint ends.

    Returns:
        uint8 array with ``ndim`` dimensions, which shares the memory of ``content``.

    Raises:
        ConfigError: the magic number is not that of ``ndim`` dimensions of unsigned bytes, or the
            length is not the one that the header promises.
    """
    header_bytes = 4 + 4 * ndim
    if len(content) < header_bytes:
        raise ConfigError(
            f'{path} ends inside its header ({len(content)} bytes, header {header_bytes}): {fix}'
        )
    magic, *shape = struct.unpack(f'>{1 + ndim}I', content[:header_bytes])
    # 0x08 is the idx code for unsigned bytes; the low byte is the number of dimensions.
    expected_magic = 0x0800 | ndim
    if magic != expected_magic:
        raise ConfigError(
            f'{path} starts with {magic:#010x}, not {expected_magic:#010x}, so it is no idx file '
            f'of unsigned bytes in {ndim} dimension(s): {fix}'
        )
    values = len(content) - header_bytes
    # Python integers: a damaged header's product can exceed 64 bits.
    promised = 1
    for length in shape:
        promised *= length
    if values != promised:
        raise ConfigError(
            f'{path} holds {values} values but its header promises {" x ".join(map(str, shape))}: '
            f'{fix}'
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def read_idx(path: str | Path, ndim: int, fix: str = _DOWNLOAD_AGAIN) -> np.ndarray:
    """Read an idx file, plain or gzipped; see :func:`read_content` and :func:`parse_idx`."""
    return parse_idx(read_content(path, fix), ndim, path, fix)


def check_pair(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    images_path: str | Path,
    labels_path: str | Path,
    fix: str = 'get both again',
) -> None:
    """Complain about images and labels that do not belong together.

    Args:
        images: ``(N, H, W)``.
        labels: ``(N,)``, to be in 0..num_classes-1.
        num_classes: number of classes of the data set.
        images_path: what to call the file of the images.
        labels_path: what to call the file of the labels.
        fix: how a complaint ends.

    Raises:
        ConfigError: the counts differ or a label is too large.
    """
    if len(images) != len(labels):
        raise ConfigError(
            f'{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} '
            f'labels, so they do not belong together: {fix}'
        )
    if len(labels) and labels.max() >= num_classes:
        raise ConfigError(
            f'{labels_path} holds the label {labels.max()}, but the data set has {num_classes} '
            f'classes, labels 0 to {num_classes - 1}: {fix}'
        )
