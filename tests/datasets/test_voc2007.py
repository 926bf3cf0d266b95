"""VOC2007 in COCO's layout, from XML files written by hand and from archives in miniature."""

import hashlib
import json
import tarfile
from dataclasses import replace

import pytest
from mmdet.datasets import VOCDataset
from PIL import Image

from mmdet_moe.datasets import voc2007
from mmdet_moe.datasets.voc2007 import CLASSES, prepare_voc2007, read_annotation
from mmdet_moe.errors import ConfigError

OBJECT = (
    '<object><name>{0}</name><difficult>{1}</difficult><bndbox><xmin>{2}</xmin><ymin>{3}</ymin>'
    '<xmax>{4}</xmax><ymax>{5}</ymax></bndbox>{6}</object>'
)
PART = (
    '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>'
    '</bndbox></part>'
)


def write_image(folder, id_, objects, size=(40, 20)):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (int(id_) % 256, 99, 0)).save(folder / f'JPEGImages/{id_}.jpg')
    shape = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>'
    text = ''.join(OBJECT.format(*(*values, '')[:7]) for values in objects)
    (folder / f'Annotations/{id_}.xml').write_text(f'<annotation>{shape}{text}</annotation>')


@pytest.fixture
def devkit(tmp_path):
    """Two images of trainval and one of test."""
    folder = tmp_path / 'VOCdevkit' / 'VOC2007'
    write_image(folder, '000005', [('person', 0, 1, 1, 40, 20, PART), ('dog', 1, 2, 3, 4, 5)])
    write_image(folder, '000007', [])
    write_image(folder, '000001', [('tvmonitor', 0, 11, 6, 30, 15)])
    (folder / 'ImageSets/Main/trainval.txt').write_text('000005\n000007\n')
    (folder / 'ImageSets/Main/test.txt').write_text('000001\n')
    return tmp_path / 'VOCdevkit'


def contents(out):
    return [json.loads((out / f'{split}.json').read_text()) for split in ('train', 'val')]


def test_classes_are_those_of_mmdetection():
    assert VOCDataset.METAINFO['classes'] == CLASSES


@pytest.mark.parametrize('below', ['', 'VOC2007'])
def test_source(devkit, tmp_path, below):
    out = tmp_path / 'out'
    status, counts = prepare_voc2007(out, devkit / below)
    assert status == 'written'
    train, val = contents(out)
    assert [c['name'] for c in train['categories']] == list(CLASSES)
    assert [c['id'] for c in train['categories']] == list(range(1, 21))
    assert [(i['file_name'], i['width'], i['height']) for i in train['images']] == [
        ('000005.jpg', 40, 20),
        ('000007.jpg', 40, 20),
    ]
    person, dog = train['annotations']
    # By hand: the pixels 1 to 40 are the whole width; 2 to 4 are three pixels, after one.
    assert (person['category_id'], person['bbox'], person['iscrowd']) == (15, [0, 0, 40, 20], 0)
    assert (dog['category_id'], dog['bbox'], dog['iscrowd']) == (12, [1, 2, 3, 3], 1)
    (monitor,) = val['annotations']
    assert (monitor['bbox'], monitor['area']) == ([10, 5, 20, 10], 200)
    assert counts['train']['objects'] == 1  # the difficult one is not counted
    assert counts['val']['sizes'] == {'small': 1, 'medium': 0, 'large': 0}
    for id_ in ('000001', '000005', '000007'):
        copy, original = out / f'images/{id_}.jpg', devkit / f'VOC2007/JPEGImages/{id_}.jpg'
        assert copy.read_bytes() == original.read_bytes()
    assert prepare_voc2007(out, devkit / below) == ('already there', counts)
    with pytest.raises(ConfigError, match=r'holds another data set, part of one, or one made with'):
        prepare_voc2007(out, devkit, size=64)
    (out / 'val.json').unlink()
    with pytest.raises(ConfigError, match='part of one'):
        prepare_voc2007(out, devkit / below)
    (out / 'dataset.json').write_text('[')
    with pytest.raises(ConfigError, match=r'dataset\.json is no note of what'):
        prepare_voc2007(out, devkit / below)


def test_resized(devkit, tmp_path):
    prepare_voc2007(tmp_path / 'out', devkit, size=80)
    train, _ = contents(tmp_path / 'out')
    assert (train['images'][0]['width'], train['images'][0]['height']) == (80, 40)
    assert [box['bbox'] for box in train['annotations']] == [[0, 0, 80, 40], [2, 4, 6, 6]]
    assert train['annotations'][1]['area'] == 36
    with Image.open(tmp_path / 'out/images/000005.jpg') as image:
        assert image.size == (80, 40)


def names_of(out):
    return [[image['file_name'][:-4] for image in content['images']] for content in contents(out)]


def test_ids(devkit, tmp_path):
    one, two = tmp_path / 'one.txt', tmp_path / 'two.txt'
    one.write_text('\ufeff000001\r\n000007\r\n')
    two.write_text('000005\n')
    prepare_voc2007(tmp_path / 'official', devkit, ids=[one])
    assert names_of(tmp_path / 'official') == [['000007'], ['000001']]
    prepare_voc2007(tmp_path / 'own', devkit, ids=[one, two])
    assert names_of(tmp_path / 'own') == [['000001', '000007'], ['000005']]
    for text, message in (
        ('000001 000009', '000009 is in neither of the official splits'),
        ('', 'lists no image'),
        ('000001', r"there is no image for the split 'train'"),
    ):
        one.write_text(text)
        with pytest.raises(ConfigError, match=message):
            prepare_voc2007(tmp_path / 'wrong', devkit, ids=[one])
    with pytest.raises(ConfigError, match='both files list 000005'):
        prepare_voc2007(tmp_path / 'wrong', devkit, ids=[two, two])
    with pytest.raises(ConfigError, match='there is no file'):
        prepare_voc2007(tmp_path / 'wrong', devkit, ids=[tmp_path / 'no.txt'])
    assert not any((tmp_path / 'wrong').glob('*'))


def test_missing_and_broken_files(devkit, tmp_path):
    folder, out = devkit / 'VOC2007', tmp_path / 'out'
    annotation, image = folder / 'Annotations/000005.xml', folder / 'JPEGImages/000005.jpg'
    kept = annotation.read_text()
    for text, message in (
        (kept[:-20], r'000005\.xml is no annotation of VOC \(ParseError'),
        ('<html/>', r'000005\.xml is no annotation of VOC \(KeyError'),
        (kept.replace('dog', 'wolf'), r"000005\.xml has an object of the class 'wolf'"),
        (
            kept.replace('<xmax>40', '<xmax>42'),
            r'000005\.xml has a person from 1, 1 to 42, 20, which',
        ),
        (
            kept.replace('<xmin>2', '<xmin>5'),
            'has a dog from 5, 3 to 4, 5, which is no box in the image',
        ),
        (kept.replace('<xmin>2', '<xmin>nan'), 'has a dog from nan, 3 to'),
        (kept.replace('<width>40', '<width>80'), r'has 40×20 pixels, and 80×20 in its annot'),
    ):
        annotation.write_text(text)
        with pytest.raises(ConfigError, match=message):
            prepare_voc2007(out, devkit)
    annotation.write_text(kept)
    image.write_bytes(b'no image')
    with pytest.raises(ConfigError, match=r'000005\.jpg cannot be read as an image'):
        prepare_voc2007(out, devkit)
    image.unlink()
    with pytest.raises(ConfigError, match=r'there is no .*000005\.jpg'):
        prepare_voc2007(out, devkit)
    assert not out.exists()
    prepare_voc2007(out, devkit, skip_missing=True)
    assert names_of(out) == [['000007'], ['000001']]
    assert prepare_voc2007(out, devkit, skip_missing=True)[0] == 'already there'
    (folder / 'JPEGImages/000007.jpg').rename(image)
    for skip_missing in (False, True):  # both would be of other images
        with pytest.raises(ConfigError, match='holds another data set'):
            prepare_voc2007(out, devkit, skip_missing=skip_missing)
    (folder / 'ImageSets/Main/test.txt').unlink()
    with pytest.raises(ConfigError, match=r'there is no .*test\.txt: get both archives'):
        prepare_voc2007(tmp_path / 'b', devkit)
    with pytest.raises(ConfigError, match='there is no VOC2007/Annotations in it'):
        prepare_voc2007(tmp_path / 'b', tmp_path / 'out')


def test_an_annotation_without_objects(devkit):
    assert read_annotation(devkit / 'VOC2007/Annotations/000007.xml') == ((40, 20), [])


def test_archives(devkit, tmp_path, server, monkeypatch):
    """As published: both have a part of the same folder."""
    archives = []
    for archive, ids in zip(voc2007.ARCHIVES, (('000005', '000007'), ('000001',)), strict=True):
        file = tmp_path / archive.name
        split = 'test' if 'test' in archive.name else 'trainval'
        names = [f'ImageSets/Main/{split}.txt']
        names += [f'{kind}/{i}.{end}' for i in ids for kind, end in KINDS]
        with tarfile.open(file, 'w') as tar:
            for name in names:
                tar.add(devkit / 'VOC2007' / name, f'VOCdevkit/VOC2007/{name}')
        content = file.read_bytes()
        server.files[f'/{file.name}'] = content
        md5 = hashlib.md5(content).hexdigest()
        archives.append(replace(archive, md5=md5, num_bytes=len(content), unpacked_bytes=0))
    monkeypatch.setattr(voc2007, 'ARCHIVES', archives)
    out = tmp_path / 'out'
    options = dict(url_base=server.url, remove_archives=True)
    assert prepare_voc2007(out, **options)[0] == 'written'
    assert names_of(out) == [['000005', '000007'], ['000001']]
    assert {path.name for path in out.iterdir()} == {
        'VOCdevkit', 'images', 'train.json', 'val.json', 'dataset.json'
    }  # fmt: skip
    assert prepare_voc2007(out, **options)[0] == 'already there'
    assert server.ranges == [None, None]


KINDS = (('Annotations', 'xml'), ('JPEGImages', 'jpg'))


def test_what_is_published():
    """As torchvision has it; the sizes are those of the official server."""
    trainval, test = voc2007.ARCHIVES
    assert voc2007.URL_BASE == 'https://thor.robots.ox.ac.uk/pascal/VOC/voc2007'
    assert (trainval.name, test.name) == ('VOCtrainval_06-Nov-2007.tar', 'VOCtest_06-Nov-2007.tar')
    assert trainval.md5 == 'c52e279531787c972589f7e41ab4ae64'
    assert test.md5 == 'b6e924de25625d8de591ea690078ad9f'
