import gzip

import numpy as np
import pytest

from mmdet_moe.datasets.idx import check_pair, find_idx, read_idx
from mmdet_moe.errors import ConfigError

LABELS = b'\x00\x00\x08\x01\x00\x00\x00\x03\x05\x06\x07'


def test_reader_on_bytes_written_by_hand(tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(
        b'\x00\x00\x08\x03' + b'\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x03' + bytes(range(6))
    )
    assert read_idx(path, ndim=3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    zipped = tmp_path / 'images.gz'
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_idx(zipped, ndim=3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('x', b'\x00\x00\x08', 'ends inside its header'),
        ('x', b'\x00\x00\x08\x03' + LABELS[4:], 'starts with 0x00000803, not 0x00000801'),
        ('x', b'\x00\x00\x0d\x01' + LABELS[4:], 'no idx file of unsigned bytes'),
        ('x', LABELS[:-1], 'holds 2 values but its header promises 3'),
        ('x', LABELS + b'\x00', 'holds 4 values but its header promises 3'),
        ('x.gz', LABELS, 'cannot be read'),
        ('x.gz', gzip.compress(LABELS, mtime=0)[:-9], 'cannot be read'),
    ],
)
def test_damaged_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf'{message}.*: call the librarian$'):
        read_idx(path, ndim=1, fix='call the librarian')


def test_plain_files_win_over_gzipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r'x \(or the same with .gz\) does not exist'):
        find_idx(tmp_path, 'x')
    (tmp_path / 'x.gz').touch()
    assert find_idx(tmp_path, 'x') == tmp_path / 'x.gz'
    (tmp_path / 'x').touch()
    assert find_idx(tmp_path, 'x') == tmp_path / 'x'


def test_pairs():
    images = np.zeros((3, 2, 2), np.uint8)
    check_pair(images, np.array([0, 1, 2], np.uint8), 3, 'a', 'b')
    check_pair(images[:0], np.zeros(0, np.uint8), 3, 'a', 'b')
    with pytest.raises(ConfigError, match=r'^a holds 3 images but b holds 2 labels'):
        check_pair(images, np.zeros(2, np.uint8), 3, 'a', 'b')
    with pytest.raises(ConfigError, match=r'^b holds the label 3, .* 3 classes, labels 0 to 2'):
        check_pair(images, np.array([0, 3, 1], np.uint8), 3, 'a', 'b')
