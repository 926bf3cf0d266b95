import gzip
import struct

import numpy as np
import pytest
from miniature import expect_fashion_mnist, write_fashion_mnist
from mmpretrain.datasets import FashionMNIST

from mmdet_moe.datasets import fashion_mnist
from mmdet_moe.datasets.fashion_mnist import prepare_fashion_mnist
from mmdet_moe.errors import ConfigError

NAMES = [
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
]


@pytest.fixture(params=[False, True], ids=['plain', 'gz'])
def source(request, tmp_path, monkeypatch):
    """A folder of the four files, as they lie on a server or in a distribution's package."""
    folder = write_fashion_mnist(tmp_path / 'source', gz=request.param)
    expect_fashion_mnist(monkeypatch, folder)
    return folder


@pytest.fixture
def gzipped(tmp_path, monkeypatch):
    folder = write_fashion_mnist(tmp_path / 'source', gz=True)
    expect_fashion_mnist(monkeypatch, folder)
    return folder


@pytest.fixture
def served(gzipped, server):
    """The gzipped files on a server."""
    for path in gzipped.iterdir():
        server.files[f'/{path.name}'] = path.read_bytes()
    return server


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def content_of(path):
    return gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()


def replace_content(path, change):
    content = change(content_of(path))
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def test_from_a_folder(source, tmp_path):
    out = tmp_path / 'deep' / 'out'
    assert prepare_fashion_mnist(out, source) == {'train': 50, 'test': 20}
    assert names_in(out) == NAMES
    for path in source.iterdir():
        assert (out / path.name.removesuffix('.gz')).read_bytes() == content_of(path)
    assert prepare_fashion_mnist(out, source) is None
    assert prepare_fashion_mnist(out, tmp_path / 'gone', overwrite=True) is None


def test_mmpretrain_reads_it(gzipped, tmp_path):
    prepare_fashion_mnist(tmp_path / 'out', gzipped)
    data = FashionMNIST(str(tmp_path / 'out'), split='test', test_mode=True, download=False)
    assert len(data) == 20
    content = gzip.decompress((gzipped / 't10k-images-idx3-ubyte.gz').read_bytes())
    expected = np.frombuffer(content[16:], np.uint8).reshape(20, 28, 28)
    for index in (0, 7, 19):
        info = data.get_data_info(index)
        assert (info['img'] == expected[index]).all()
        assert info['gt_label'] == index % 10


def test_unpacked_where_they_were_packed(gzipped):
    assert prepare_fashion_mnist(gzipped, gzipped) == {'train': 50, 'test': 20}
    assert names_in(gzipped) == sorted([*NAMES, *(f'{name}.gz' for name in NAMES)])


def test_gzip_may_be_another_one(gzipped, tmp_path):
    """The header of a gzip file holds a name and a time, and the level is free."""
    for path in gzipped.iterdir():
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=12345))
    assert prepare_fashion_mnist(tmp_path / 'out', gzipped) == {'train': 50, 'test': 20}


def test_what_is_missing_is_added(source, tmp_path):
    out = tmp_path / 'out'
    prepare_fashion_mnist(out, source)
    (out / 'train-labels-idx1-ubyte').unlink()
    assert prepare_fashion_mnist(out, source) == {'train': 50, 'test': 20}
    assert names_in(out) == NAMES


def relabelled(content):
    return content[:-1] + bytes([10])


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('train-images-idx3-ubyte', lambda c: c[:-5], 'holds 39195 values but its header promises'),
        ('t10k-images-idx3-ubyte', lambda c: c[:9], 'ends inside its header'),
        ('t10k-labels-idx1-ubyte', lambda c: b'\1' + c[1:], 'starts with 0x01000801, not'),
        ('t10k-labels-idx1-ubyte', relabelled, 'holds the label 10, but .* labels 0 to 9'),
        (
            't10k-labels-idx1-ubyte',
            lambda c: c[:4] + struct.pack('>I', 19) + c[8:-1],
            'holds 20 images but .* holds 19 labels',
        ),
        (
            't10k-labels-idx1-ubyte',
            lambda c: c[:-1] + b'\0',
            "has the MD5 .* instead of .*: it is not Fashion-MNIST's",
        ),
        ('train-images-idx3-ubyte', lambda c: c[:-1] + b'\0', 'has the MD5 .* get it again'),
    ],
)
def test_a_bad_file_in_the_source(source, tmp_path, name, change, message):
    out = tmp_path / 'out'
    path = source / name if (source / name).exists() else source / f'{name}.gz'
    replace_content(path, change)
    with pytest.raises(ConfigError, match=message) as error:
        prepare_fashion_mnist(out, source)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    assert names_in(out) == []


def test_damaged_gzip(gzipped, tmp_path):
    path = gzipped / 't10k-labels-idx1-ubyte.gz'
    for content in (path.read_bytes()[:-9], b'no gzip file'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r't10k-labels-idx1-ubyte.gz cannot be read'):
            prepare_fashion_mnist(tmp_path / 'out', gzipped)
    assert names_in(tmp_path / 'out') == []


def test_a_file_that_the_source_lacks(source, tmp_path):
    for path in source.glob('t10k-labels*'):
        path.unlink()
    with pytest.raises(ConfigError, match=r't10k-labels-idx1-ubyte \(or .* does not exist'):
        prepare_fashion_mnist(tmp_path / 'out', source)
    assert names_in(tmp_path / 'out') == []


def test_other_files_are_only_replaced_when_asked(source, tmp_path):
    out = write_fashion_mnist(tmp_path / 'out', num_train=30, seed=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r'is there already and is not .* --overwrite'):
        prepare_fashion_mnist(out, source)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # Not even then before the new ones are verified.
    labels = next(source.glob('train-labels*'))
    good = labels.read_bytes()
    replace_content(labels, relabelled)
    with pytest.raises(ConfigError, match='label 10'):
        prepare_fashion_mnist(out, source, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    labels.write_bytes(good)
    assert prepare_fashion_mnist(out, source, overwrite=True) == {'train': 50, 'test': 20}
    assert prepare_fashion_mnist(out, source) is None


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    path_type = type(tmp_path)
    write_bytes = path_type.write_bytes

    def write(path, content):
        if path.name == NAMES[1]:
            raise OSError(28, 'No space left on device')
        return write_bytes(path, content)

    monkeypatch.setattr(path_type, 'write_bytes', write)
    with pytest.raises(OSError, match='No space left'):
        prepare_fashion_mnist(tmp_path / 'out', source)
    assert names_in(tmp_path / 'out') == []


def test_download(served, tmp_path):
    out = tmp_path / 'out'
    assert prepare_fashion_mnist(out, url_base=served.url) == {'train': 50, 'test': 20}
    assert names_in(out) == sorted([*NAMES, *(f'{name}.gz' for name in NAMES)])
    assert len(served.ranges) == 4
    assert prepare_fashion_mnist(out, url_base=served.url) is None
    assert len(served.ranges) == 4


def test_download_without_keeping(served, tmp_path):
    prepare_fashion_mnist(tmp_path, url_base=f'{served.url}/', remove_archives=True)
    assert names_in(tmp_path) == sorted([*NAMES, 'source'])


def test_gzipped_files_put_there_by_hand_are_used(served, gzipped, tmp_path):
    """Whoever compressed them: what counts is their content."""
    out = tmp_path / 'out'
    out.mkdir()
    for name in NAMES[1:]:
        content = gzip.decompress((gzipped / f'{name}.gz').read_bytes())
        (out / f'{name}.gz').write_bytes(gzip.compress(content, 1, mtime=12345))
    assert prepare_fashion_mnist(out, url_base=served.url) == {'train': 50, 'test': 20}
    assert served.ranges == [None]
    for name in NAMES:
        (out / name).unlink()
    replace_content(out / 'train-labels-idx1-ubyte.gz', relabelled)
    with pytest.raises(ConfigError, match=r'out/train-labels-idx1-ubyte.gz holds the label 10'):
        prepare_fashion_mnist(out, url_base=served.url)
    assert not set(names_in(out)) & set(NAMES)


def test_interrupted_download_is_resumed(served, tmp_path):
    out = tmp_path / 'out'
    served.cut_after = [10_000, 0, 0, 0]
    with pytest.raises(ConfigError, match=r'closed early \(10000 bytes are kept'):
        prepare_fashion_mnist(out, url_base=served.url)
    assert names_in(out) == ['train-images-idx3-ubyte.gz.part']
    served.ranges.clear()
    prepare_fashion_mnist(out, url_base=served.url, remove_archives=True)
    assert names_in(out) == NAMES
    assert served.ranges == ['bytes=10000-', None, None, None]


def test_damage_on_the_server_leaves_nothing_unpacked(served, tmp_path):
    content = bytearray(served.files['/t10k-images-idx3-ubyte.gz'])
    content[500] ^= 1
    served.files['/t10k-images-idx3-ubyte.gz'] = bytes(content)
    with pytest.raises(ConfigError, match=r't10k-images-idx3-ubyte.gz came with the MD5'):
        prepare_fashion_mnist(tmp_path / 'out', url_base=served.url)
    assert not set(names_in(tmp_path / 'out')) & set(NAMES)


def test_the_server_and_names_are_those_of_mmpretrain():
    theirs = dict(FashionMNIST.train_list + FashionMNIST.test_list)
    assert theirs == {a.path: a.md5 for a in fashion_mnist.ARCHIVES.values()}
    assert f'{fashion_mnist.URL_BASE}/' == FashionMNIST.url_prefix
    assert FashionMNIST.METAINFO['classes'] == fashion_mnist.CLASSES
    assert list(fashion_mnist.ARCHIVES) == list(fashion_mnist.CONTENT_MD5)


def test_sizes_are_those_of_the_format():
    """Header and values of 60,000 and 10,000 images of 28 x 28, and as many labels."""
    sizes = {name: archive.unpacked_bytes for name, archive in fashion_mnist.ARCHIVES.items()}
    for prefix, count in (('train', 60_000), ('t10k', 10_000)):
        assert sizes[f'{prefix}-images-idx3-ubyte'] == 16 + count * 28 * 28
        assert sizes[f'{prefix}-labels-idx1-ubyte'] == 8 + count
