import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmdet_moe.datasets import download
from mmdet_moe.datasets.download import Archive, prepare
from mmdet_moe.errors import ConfigError


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_bytes(members, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            archive.addfile(info)
    return buffer.getvalue()


def describe(content, path, provides):
    return Archive(path, hashlib.md5(content).hexdigest(), len(content), len(content), provides)


IMAGES = {f'val2017/{i:012d}.jpg': bytes([i]) * 50_000 for i in range(1, 5)}


@pytest.fixture
def images(server):
    """A miniature val2017.zip of four files, on the server."""
    content = zip_bytes(IMAGES)
    server.files['/zips/val2017.zip'] = content
    return describe(content, 'zips/val2017.zip', {'val2017': 4})


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def check_unpacked(out):
    assert {
        f'val2017/{path.name}': path.read_bytes() for path in (out / 'val2017').iterdir()
    } == IMAGES


def test_download_verify_unpack(server, images, tmp_path):
    out = tmp_path / 'coco'
    assert prepare([images], out, server.url + '/') == ['val2017.zip']
    check_unpacked(out)
    assert names_in(out) == ['val2017', 'val2017.zip']
    assert prepare([images], out, server.url) == []
    assert server.ranges == [None]


def test_archives_can_be_removed(server, images, tmp_path):
    prepare([images], tmp_path, server.url, remove_archives=True)
    assert names_in(tmp_path) == ['val2017']
    assert prepare([images], tmp_path, server.url) == []


def test_interrupted_connections_are_resumed_in_one_run(server, images, tmp_path):
    server.cut_after = [70_000, 60_000]
    prepare([images], tmp_path, server.url)
    check_unpacked(tmp_path)
    assert server.ranges == [None, 'bytes=70000-', 'bytes=130000-']


def test_a_later_run_resumes(server, images, tmp_path):
    server.cut_after = [70_000, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match=r'closed early \(70000 bytes are kept'):
        prepare([images], tmp_path, server.url)
    assert names_in(tmp_path) == ['val2017.zip.part']
    server.cut_after, server.ranges = [], []
    prepare([images], tmp_path, server.url)
    check_unpacked(tmp_path)
    assert server.ranges == ['bytes=70000-']


def test_server_without_ranges_starts_over(server, images, tmp_path):
    server.with_ranges = False
    server.cut_after = [70_000]
    prepare([images], tmp_path, server.url)
    check_unpacked(tmp_path)
    assert server.ranges == [None, 'bytes=70000-']


def test_a_complete_part_needs_no_server(images, server, tmp_path):
    (tmp_path / 'val2017.zip.part').write_bytes(server.files['/zips/val2017.zip'])
    prepare([images], tmp_path, 'http://127.0.0.1:9')
    check_unpacked(tmp_path)


def test_an_archive_put_there_by_hand_is_used(images, server, tmp_path):
    (tmp_path / 'val2017.zip').write_bytes(server.files['/zips/val2017.zip'])
    prepare([images], tmp_path, 'http://127.0.0.1:9')
    check_unpacked(tmp_path)


def test_wrong_archive_put_there_by_hand_is_kept_and_told(images, server, tmp_path):
    (tmp_path / 'val2017.zip').write_bytes(b'something else')
    with pytest.raises(ConfigError, match=r'has the MD5 .* delete it'):
        prepare([images], tmp_path, server.url)
    assert names_in(tmp_path) == ['val2017.zip']


def test_wrong_checksum_leaves_nothing(server, images, tmp_path):
    damaged = bytearray(server.files['/zips/val2017.zip'])
    damaged[1000] ^= 1
    server.files['/zips/val2017.zip'] = bytes(damaged)
    with pytest.raises(ConfigError, match=f'with the MD5 .* instead of {images.md5}'):
        prepare([images], tmp_path, server.url)
    assert names_in(tmp_path) == []


def test_another_file_under_the_url_does_not_destroy_the_part(server, images, tmp_path):
    part = tmp_path / 'val2017.zip.part'
    part.write_bytes(server.files['/zips/val2017.zip'][:70_000])
    server.with_ranges = False
    server.files['/zips/val2017.zip'] = b'<html>Please log in</html>'
    with pytest.raises(ConfigError, match='is a file of 26 bytes'):
        prepare([images], tmp_path, server.url)
    assert part.stat().st_size == 70_000


def test_offline(images, tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with pytest.raises(ConfigError) as error:
        prepare([images], tmp_path / 'coco', 'http://127.0.0.1:9')
    message = str(error.value)
    assert 'cannot download http://127.0.0.1:9/zips/val2017.zip' in message
    assert f'put it at {tmp_path / "coco" / "val2017.zip"}' in message
    assert names_in(tmp_path / 'coco') == []


def test_missing_file_on_the_server(server, images, tmp_path):
    server.files.clear()
    with pytest.raises(ConfigError, match='HTTP 404'):
        prepare([images], tmp_path, server.url)
    assert len(server.ranges) == 1


def test_full_disk_is_told_before_the_download(server, images, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(ConfigError, match=r'needs 0.0 GB more but its disk has 0.0 GB free'):
        prepare([images], tmp_path / 'new' / 'coco', server.url)
    assert server.ranges == []
    assert names_in(tmp_path) == []
    # What is downloaded already takes no more room.
    (tmp_path / 'val2017.zip').write_bytes(server.files['/zips/val2017.zip'])
    prepare([images], tmp_path, server.url)
    check_unpacked(tmp_path)


def test_half_unpacked_folder_is_told(server, images, tmp_path):
    (tmp_path / 'val2017').mkdir()
    (tmp_path / 'val2017' / '000000000001.jpg').write_bytes(b'')
    with pytest.raises(ConfigError, match='val2017 holds 1 of 4 files: move it away'):
        prepare([images], tmp_path, server.url)
    assert server.ranges == []


def test_files_join_a_folder_that_exists_and_replace_nothing(server, tmp_path):
    content = zip_bytes({'annotations/a.json': b'new a', 'annotations/deep/b.json': b'new b'})
    server.files['/a.zip'] = content
    archive = describe(
        content, 'a.zip', {'annotations/a.json': None, 'annotations/deep/b.json': None}
    )
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'a.json').write_bytes(b'old a')
    prepare([archive], tmp_path, server.url)
    assert (tmp_path / 'annotations' / 'a.json').read_bytes() == b'old a'
    assert (tmp_path / 'annotations' / 'deep' / 'b.json').read_bytes() == b'new b'


def test_tar_archive(server, tmp_path):
    content = tar_bytes({'cifar-100-python/train': b'x' * 100, 'cifar-100-python/meta': b'y'})
    server.files['/c.tar.gz'] = content
    archive = describe(
        content, 'c.tar.gz', {'cifar-100-python/train': None, 'cifar-100-python/meta': None}
    )
    prepare([archive], tmp_path, server.url)
    assert (tmp_path / 'cifar-100-python' / 'train').read_bytes() == b'x' * 100
    assert names_in(tmp_path) == ['c.tar.gz', 'cifar-100-python']


def test_an_interrupted_move_is_made_up_for(server, tmp_path, monkeypatch):
    """Two archives of one folder; what tells that the second is there comes last."""
    first = tar_bytes({'V/JPEGImages/0.jpg': b'0', 'V/ImageSets/trainval.txt': b'0'})
    second = tar_bytes(
        {'V/JPEGImages/1.jpg': b'1', 'V/JPEGImages/2.jpg': b'2', 'V/ImageSets/test.txt': b'1 2'}
    )
    server.files |= {'/a.tar': first, '/b.tar': second}
    archives = [
        describe(first, 'a.tar', {'V/ImageSets/trainval.txt': None}),
        describe(second, 'b.tar', {'V/ImageSets/test.txt': None}),
    ]
    rename = Path.rename

    def interrupted(path, target):
        if path.name == '2.jpg':
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(archives, tmp_path, server.url)
    prepare(archives, tmp_path, server.url)
    assert names_in(tmp_path / 'V' / 'JPEGImages') == ['0.jpg', '1.jpg', '2.jpg']
    assert names_in(tmp_path / 'V' / 'ImageSets') == ['test.txt', 'trainval.txt']


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.zip', zip_bytes({'ok': b'1', '../evil': b'2'}), "'../evil', a path out"),
        ('a.zip', zip_bytes({'/evil': b'2'}), "'/evil', a path out"),
        ('a.tar.gz', tar_bytes({'ok': b'1', 'a/../../evil': b'2'}), 'a path out of its folder'),
        ('a.tar.gz', tar_bytes({'ok': b'1'}, link='evil'), "'evil', a link or device"),
        ('a.tar.gz', tar_bytes({'ok': b'1' * 100_000})[:-30], 'is damaged'),
        ('a.tar.gz', b'no archive', 'is damaged'),
        ('a.zip', b'no archive', 'is damaged'),
        ('a.zip', zip_bytes({'ok': b'1' * 100}).replace(b'1' * 100, b'2' * 100), 'Bad CRC-32'),
        ('a.zip', zip_bytes({'other': b'1'}), 'lacks some of ok'),
    ],
)
def test_bad_archive_leaves_nothing(tmp_path, name, content, message):
    """The checksum is right here: it is the archive itself that is bad."""
    out = tmp_path / 'out'
    out.mkdir()
    (out / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare([describe(content, name, {'ok': None})], out, 'http://127.0.0.1:9')
    assert names_in(out) == [name]
    assert names_in(tmp_path) == ['out']


def test_coco_splits_choose_the_archives(server, tmp_path, monkeypatch):
    val = zip_bytes(IMAGES)
    labels = zip_bytes({f'annotations/instances_{s}2017.json': b'{}' for s in ('train', 'val')})
    server.files |= {'/zips/val2017.zip': val, '/annotations/annotations_trainval2017.zip': labels}
    monkeypatch.setitem(
        download.COCO_SPLITS, 'val2017', describe(val, 'zips/val2017.zip', {'val2017': 4})
    )
    annotations = download.COCO_ANNOTATIONS
    monkeypatch.setattr(
        download, 'COCO_ANNOTATIONS', describe(labels, annotations.path, annotations.provides)
    )
    unpacked = download.prepare_coco(tmp_path, ['val2017', 'val2017'], server.url)
    assert unpacked == ['annotations_trainval2017.zip', 'val2017.zip']
    assert names_in(tmp_path / 'annotations') == [
        'instances_train2017.json',
        'instances_val2017.json',
    ]
    with pytest.raises(ConfigError, match=r"splits must be out of .* not 'test2017'"):
        download.prepare_coco(tmp_path, ['test2017'], server.url)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_lands_where_mmpretrain_looks(name):
    theirs = getattr(pytest.importorskip('mmpretrain.datasets.cifar'), name.upper())
    ours = download.CIFAR[name]
    assert ours.md5 == theirs.tgz_md5
    assert ours.name == theirs.filename
    assert f'{download.CIFAR_URL_BASE}/{ours.path}' == theirs.url
    assert set(ours.provides) == {
        f'{theirs.base_folder}/{file}'
        for file in (
            *(file for file, _ in theirs.train_list + theirs.test_list),
            theirs.meta['filename'],
        )
    }
