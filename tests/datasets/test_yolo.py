"""YOLO's format into COCO's layout."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmdet_moe.datasets.yolo import prepare_yolo, read_labels
from mmdet_moe.errors import ConfigError


def write_image(file, text=None, size=(40, 20), **options):
    """An image, and its labels where Ultralytics looks for them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (len(file.name), 0, 0)).save(file, **options)
    if text is not None:
        parts = file.with_suffix('.txt').parts
        labels = Path(*('labels' if part == 'images' else part for part in parts))
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text(text)


@pytest.fixture
def source(tmp_path):
    """images/train with two images, one of them without labels, images/val with one."""
    folder = tmp_path / 'source'
    write_image(folder / 'images/train/a.jpg', '1 0.5 0.5 0.25 0.5\n0 0.1 0.5 0.4 1.0\n')
    write_image(folder / 'images/train/b.png')
    write_image(folder / 'images/val/a.jpg', '\ufeff\n')
    (folder / 'data.yaml').write_text('names: {0: cat, 1: dog}\n')
    return folder


def content(out, split):
    return json.loads((out / f'{split}.json').read_text())


def names_of(out):
    return [[i['file_name'] for i in content(out, split)['images']] for split in ('train', 'val')]


def test_boxes_and_names(source, tmp_path):
    out = tmp_path / 'out'
    status, counts = prepare_yolo(source, out)
    assert status == 'written'
    assert names_of(out) == [['train/a.jpg', 'train/b.png'], ['val/a.jpg']]
    train = content(out, 'train')
    assert [c['name'] for c in train['categories']] == ['cat', 'dog']
    # By hand, of 40×20 px; what leaves the image on the left is cut off.
    assert [(b['category_id'], b['bbox']) for b in train['annotations']] == [
        (2, [15, 5, 10, 10]),
        (1, [0, 0, 12, 20]),
    ]
    assert counts['train']['classes'] == {'cat': 1, 'dog': 1}
    assert counts['val']['objects'] == 0
    assert (out / 'images/train/b.png').read_bytes() == (source / 'images/train/b.png').read_bytes()
    assert prepare_yolo(source, out) == ('already there', counts)
    (source / 'images/train/b.png').unlink()
    write_image(source / 'images/train/b.png', size=(400, 20))
    with pytest.raises(ConfigError, match='holds another data set'):
        prepare_yolo(source, out)
    prepare_yolo(source, tmp_path / 'anew')
    (source / 'labels/train/a.txt').write_text('0 0.5 0.5 0.5 0.5')
    with pytest.raises(ConfigError, match='holds another data set'):
        prepare_yolo(source, tmp_path / 'anew')


@pytest.mark.parametrize('entries', ['names: [cat, dog]', 'names: {0: cat, 1: dog}'])
@pytest.mark.parametrize('as_lists', [False, True])
def test_splits_of_the_yaml(tmp_path, entries, as_lists):
    """Roboflow's folders, and its paths, which begin one too far up."""
    source = tmp_path / 'source'
    for split, names in (('train', 'ab'), ('valid', 'c'), ('test', 'd')):
        for name in names:
            write_image(source / split / 'images' / f'{name}.jpg', '0 0.5 0.5 0.5 0.5')
    paths = 'train: ../train/images\nval: ../test/images\n'
    if as_lists:
        paths = 'train: [train.txt]\nval: val.txt\n'
        (source / 'train.txt').write_text('./train/images/a.jpg\n./train/images/b.jpg\n')
        (source / 'val.txt').write_text('test/images/d.jpg\n')
    (source / 'data.yaml').write_text(f'{paths}{entries}\n')
    prepare_yolo(source, tmp_path / 'out')
    assert names_of(tmp_path / 'out') == [['train/a.jpg', 'train/b.jpg'], ['test/d.jpg']]
    (source / 'data.yaml').write_text(entries)
    prepare_yolo(source, tmp_path / 'by_folder')
    assert names_of(tmp_path / 'by_folder') == [['train/a.jpg', 'train/b.jpg'], ['valid/c.jpg']]
    for wrong, message in (
        ('train: train\nval: nowhere', 'there is no such place in'),
        ('train: train\nval: train', 'into train and into val'),
    ):
        (source / 'data.yaml').write_text(f'{wrong}\n{entries}')
        with pytest.raises(ConfigError, match=f'{message}.* anew with --val-share'):
            prepare_yolo(source, tmp_path / 'wrong')


def test_lists_of_images(source, tmp_path):
    """A line is an image, with blanks in its name; none is left out in silence."""
    write_image(source / 'images/train/my cat.jpg', '0 0.5 0.5 0.5 0.5')
    (source / 'data.yaml').write_text('names: [cat, dog]\ntrain: train.txt\nval: images/val\n')
    (source / 'train.txt').write_text('\ufeffimages/train/my cat.jpg\r\n./images/train/a.jpg\r\n')
    prepare_yolo(source, tmp_path / 'out')
    assert names_of(tmp_path / 'out') == [['train/a.jpg', 'train/my cat.jpg'], ['val/a.jpg']]
    (source / 'train.txt').write_text('images/train/a.jpg\nimages/train/no.jpg\n')
    with pytest.raises(
        ConfigError, match=r'train\.txt lists images/train/no\.jpg, and there is no'
    ):
        prepare_yolo(source, tmp_path / 'wrong')


@pytest.mark.parametrize('entries', ['', 'path: .\ntrain: images/train\nval: ../images/val\n'])
def test_links_and_hidden_folders(source, tmp_path, entries, capsys):
    write_image(source.parent / 'images/train/link.jpg')
    write_image(source.parent / 'images/val/b.jpg', '0 0.5 0.5 0.5 0.5')  # not in the data set
    (source / 'images/train/link.jpg').symlink_to(source.parent / 'images/train/link.jpg')
    for name in ('images', 'labels'):
        (source / name / 'val').rename(tmp_path / name / 'elsewhere')
        (source / name / 'val').symlink_to(tmp_path / name / 'elsewhere')
    (source / 'images/train/round').symlink_to(source)
    write_image(source / 'images/train/.checkpoints/a.jpg')
    write_image(source / 'images/more/c.jpg')
    (source / 'data.yaml').write_text(f'names: [cat, dog]\n{entries}')
    prepare_yolo(source, tmp_path / 'out')
    train = ['train/a.jpg', 'train/b.png', 'train/link.jpg']
    assert names_of(tmp_path / 'out') == [train, ['val/a.jpg']]
    assert '1 images are in no split and left out, such as' in capsys.readouterr().out


def test_splits_in_upper_case(tmp_path):
    for name in ('Train/a', 'Train/b', 'VAL/c', 'VAL/d'):
        write_image(tmp_path / f'in/images/{name}.jpg', '0 0.5 0.5 0.5 0.5')
    prepare_yolo(tmp_path / 'in', tmp_path / 'out', ['x'])
    assert names_of(tmp_path / 'out') == [
        ['Train/a.jpg', 'Train/b.jpg'],
        ['VAL/c.jpg', 'VAL/d.jpg'],
    ]


def test_labels_that_would_not_be_read(source, tmp_path):
    """They would make images without an object."""
    images, labels = source / 'images/train', source / 'labels/train'
    (labels / 'classes.txt').write_text('cat\ndog\n')  # as labelImg leaves it there
    (labels / 'a.txt').rename(images / 'a.txt')
    _, counts = prepare_yolo(source, tmp_path / 'out')
    assert counts['train']['objects'] == 2
    (images / 'a.txt').rename(labels / 'a.TXT')
    with pytest.raises(ConfigError, match='no image has a label file'):
        prepare_yolo(images, tmp_path / 'wrong', ['x'])
    with pytest.raises(ConfigError, match=r'a\.TXT is not read: rename it'):
        prepare_yolo(source, tmp_path / 'wrong')


def test_a_share_for_validation(tmp_path):
    """Images that lie beside their labels; the same split every time."""
    source = tmp_path / 'source'
    for number in range(10):
        write_image(source / f'{number}.jpg')
        (source / f'{number}.txt').write_text('0 0.5 0.5 0.5 0.5')
    for name, share, wanted in (('a', None, 1), ('b', 0.3, 3), ('c', 0.3, 3)):
        _, counts = prepare_yolo(source, tmp_path / name, ['thing'], share)
        assert (counts['train']['images'], counts['val']['images']) == (10 - wanted, wanted)
        assert counts['train']['objects'] == 10 - wanted
    assert names_of(tmp_path / 'b') == names_of(tmp_path / 'c')
    with pytest.raises(ConfigError, match='--val-share must be above 0 and below 1'):
        prepare_yolo(source, tmp_path / 'd', ['thing'], 1.0)


def test_classes(source, tmp_path):
    file = tmp_path / 'classes.txt'
    file.write_text('\ufefftree\r\nhouse\n\n')
    for number, given in enumerate((['tree', 'house'], [str(file)])):
        _, counts = prepare_yolo(source, tmp_path / str(number), given)
        assert list(counts['train']['classes']) == ['tree', 'house']
    _, counts = prepare_yolo(source, tmp_path / 'yaml', [str(source / 'data.yaml')])
    assert list(counts['train']['classes']) == ['cat', 'dog']
    for text, message in (
        ('names: {1: cat, 2: dog}', 'must be numbered from 0'),
        ('names: {0: cat, x: dog}', 'must be numbered from 0'),
        ('nc: 2', 'the classes have no names: give --classes'),
        ('nc: 3\nnames: [cat, dog]', r'data\.yaml says nc: 3, but has 2 names'),
        ('names: [cat, [dog]]', 'the classes have no names: give --classes'),
        ('just text', 'has no entries'),
        ('a: [', 'is not YAML'),
    ):
        (source / 'data.yaml').write_text(text)
        with pytest.raises(ConfigError, match=message):
            prepare_yolo(source, tmp_path / 'wrong')
    (source / 'data.yaml').unlink()
    for given, message in (
        (['classes.txt'], r'classes\.txt cannot be read as text'),
        (['cat', 'cat'], 'each class needs a name of its own'),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_yolo(source, tmp_path / 'wrong', given)


@pytest.mark.parametrize('numbered', [False, True])
def test_names_that_yaml_takes_for_something_else(tmp_path, numbered):
    names = ['yes', 'no', 'on', 'Off', 'null', '~', '1.0', '0x10', '2017-01-01']
    for name in ('2017_01/a', '2017_02/b'):
        write_image(tmp_path / f'in/{name}.jpg', '1 0.5 0.5 0.5 0.5')
    lines = [f'  {i}: {n}' if numbered else f'  - {n}' for i, n in enumerate(names)]
    text = '\n'.join(['path: null', 'train: 2017_01', 'val: 2017_02', 'names:', *lines])
    (tmp_path / 'in/data.yaml').write_text(text)
    prepare_yolo(tmp_path / 'in', tmp_path / 'out')
    assert [c['name'] for c in content(tmp_path / 'out', 'val')['categories']] == names
    assert names_of(tmp_path / 'out') == [['2017_01/a.jpg'], ['2017_02/b.jpg']]


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('2 0.5 0.5 0.1 0.1', 'there is no class 2, for there are 2 classes'),
        ('-1 0.5 0.5 0.1 0.1', 'there is no class -1'),
        ('0 1.5 0.5 0.1 0.1', 'must be shares of the image, from 0 to 1'),
        ('0 20 10 5 5', 'must be shares of the image'),
        ('0 0.5 0.5 0 0.1', 'width and height not 0'),
        ('0 nan 0.5 0.1 0.1', 'must be shares of the image'),
        ('0 0.5 0.5 0.1', 'is not a class and four numbers'),
        ('0 0.1 0.1 0.2 0.1 0.2 0.2', 'is not a class and four numbers'),
        ('cat 0.5 0.5 0.1 0.1', 'is not a class and four numbers'),
    ],
)
def test_wrong_lines(line, message):
    with pytest.raises(ConfigError, match=rf'a\.txt, line 2: .*{message}'):
        read_labels(f'1 0.5 0.5 0.5 0.5\n{line}\n', 'a.txt', (40, 20), 2)


def test_wrong_files(source, tmp_path):
    out = tmp_path / 'out'
    extra = source / 'labels/train/c.txt'
    extra.write_text('0 0.5 0.5 0.5 0.5')
    with pytest.raises(ConfigError, match=r'c\.txt has no image: add it'):
        prepare_yolo(source, out)
    extra.unlink()
    objects = (source / 'labels/train/a.txt').read_text()
    (source / 'labels/train/a.txt').write_text(' \n')
    with pytest.raises(ConfigError, match=r'train/a\.jpg, are all empty or missing'):
        prepare_yolo(source, out)
    (source / 'labels/train/a.txt').write_text(objects)
    with pytest.raises(ConfigError, match='lies in --source'):
        prepare_yolo(source, source / 'coco')
    (source / 'images/train/b.png').write_bytes(b'no image')
    with pytest.raises(ConfigError, match=r'b\.png cannot be read as an image'):
        prepare_yolo(source, out)
    assert not out.exists()
    out.mkdir()
    for place, message in ((tmp_path / 'no', 'no such folder'), (out, 'there is no image in it')):
        with pytest.raises(ConfigError, match=message):
            prepare_yolo(place, tmp_path / 'b', ['x'])


def test_images_that_are_stored_lying(tmp_path):
    """As OpenCV turns them by their EXIF data, so do the sizes and the resizing."""
    turned = Image.Exif()
    turned[0x0112] = 6
    source = tmp_path / 'source'
    for name in 'ab':
        write_image(source / f'images/{name}.jpg', '0 0.5 0.5 0.5 0.5', exif=turned)
    prepare_yolo(source, tmp_path / 'out', ['x'])
    (image,) = content(tmp_path / 'out', 'val')['images']
    assert (image['width'], image['height']) == (20, 40)
    prepare_yolo(source, tmp_path / 'small', ['x'], size=20)
    small = content(tmp_path / 'small', 'val')
    assert (small['images'][0]['width'], small['images'][0]['height']) == (10, 20)
    assert small['annotations'][0]['bbox'] == [2.5, 5, 5, 10]
    with Image.open(tmp_path / 'small/images' / small['images'][0]['file_name']) as stored:
        assert stored.size == (10, 20)
        assert not stored.getexif()
