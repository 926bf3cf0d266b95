"""What the check of a folder in COCO's layout finds."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdet_moe.datasets.coco_check import Part, check, contact_sheet, format_classes, parts_of
from mmdet_moe.errors import ConfigError


def write_split(folder, split, first):
    """Three images of 200×100 px: a small and a large object, a medium one, none."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    images = []
    for id_ in range(first, first + 3):
        pixels = np.random.default_rng(id_).integers(0, 256, (100, 200, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'images/{id_}.jpg')
        images.append({'id': id_, 'file_name': f'{id_}.jpg', 'width': 200, 'height': 100})
    boxes = [(0, 1, [5, 5, 20, 20]), (0, 2, [0, 0, 200, 100]), (1, 2, [9, 9, 50, 50])]
    content = {
        'images': images,
        'annotations': [
            dict(id=i, image_id=first + n, category_id=c, bbox=b, area=b[2] * b[3], iscrowd=0)
            for i, (n, c, b) in enumerate(boxes, start=1)
        ],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
    }
    (folder / f'{split}.json').write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path / 'data', 'train', 1)
    write_split(tmp_path / 'data', 'val', 11)
    return tmp_path / 'data'


def changed(folder, change, split='train'):
    """The report after ``change`` has changed the content of an annotation file."""
    file = folder / f'{split}.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return check(parts_of(folder))


def test_what_is_right(folder):
    report = check(parts_of(folder))
    assert report.wrong == []
    assert report.notes == [
        'train: 1 images show no object, such as 3.jpg',
        'val: 1 images show no object, such as 13.jpg',
    ]
    assert report.splits['val']['sizes'] == {'small': 1, 'medium': 1, 'large': 1}
    cells = [line.split() for line in format_classes(report).splitlines()]
    assert cells[1:] == [
        ['cat', '1', '0', '0', '1', '0', '0'],
        ['dog', '0', '1', '1', '0', '1', '1'],
    ]


def box(**values):
    return lambda content: content['annotations'][0].update(values)


def same_name(content):
    content['images'][1]['file_name'] = content['images'][0]['file_name']


def same_category_id(content):
    content['categories'].append({'id': 2, 'name': 'wolf'})


def without(kind, key):
    return lambda content: content[kind][0].pop(key)


def first(kind, **values):
    return lambda content: content[kind][0].update(values)


def repeat(content):
    content['annotations'].append(content['annotations'][0] | {'id': 9})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (box(bbox=[190, 5, 20, 20]), 'train: 1 boxes reach out of their image, such as annotation'),
        (box(bbox=[300, 5, 20, 20]), 'left out by a training: smaller than a pixel or outside'),
        (box(bbox=[5, 5, -20, 20]), 'left out by a training: smaller than a pixel or outside'),
        (box(bbox=[5, 5, 0, 20]), 'left out by a training: smaller than a pixel or outside'),
        (box(bbox=[5, 5, float('nan'), 20]), 'boxes are not numbers'),
        (box(category_id=7), 'of a category that is not listed, such as annotation 1 of 1.jpg'),
        (box(image_id=77), 'of images that the file does not list, such as annotation 1 of image'),
        (box(id=2), 'has two annotations with the id 2'),
        (repeat, 'annotations repeat another one, such as annotation 9 of 1.jpg'),
        (same_name, 'images are listed twice, such as 1.jpg'),
        (same_category_id, 'train: 1 ids of categories are there twice, such as 2'),
        (without('annotations', 'bbox'), "1 annotations have no `bbox`, such as {'id': 1, 'im"),
        (lambda c: c['annotations'].append(5), '1 annotations have no `bbox`, such as 5'),
        (without('categories', 'name'), "has {'id': 1} among its categories"),
        (without('categories', 'id'), "has {'name': 'cat'} among its categories"),
        (first('categories', name=7), 'a number or text, and a `name` that is text'),
        (first('images', width='200'), 'width and height numbers'),
        (first('images', file_name=None), 'whose file_name must be text'),
        (box(bbox=[5, 5, None, 20]), 'has bbox=[5, 5, None, 20] for the annotation 1, which'),
        (box(bbox=['5', '5', '20', '20']), 'which must be four numbers'),
        (box(area=None), 'has area=None and iscrowd=0 for the annotation 1, which must be a'),
        (box(bbox=5), 'has bbox=5 for the annotation 1, which must be four numbers'),
        (box(bbox={'x': 5, 'y': 5, 'w': 9, 'h': 9}), 'which must be four numbers'),
        (box(category_id=[1]), 'has image_id=1 and category_id=[1] for the annotation 1, which'),
        (box(image_id=[1]), 'has image_id=[1] and category_id=1 for the annotation 1, which'),
        (box(category_id=None), 'of a category that is not listed, such as annotation 1 of 1.jpg'),
        (box(iscrowd=None), 'and iscrowd=None for the annotation 1, which must be a number, and 0'),
        (box(iscrowd='0'), "and iscrowd='0' for the annotation 1, which must be a number, and 0"),
        (lambda c: c['images'].append(None), 'has no `id` for the image None; add it'),
        (first('images', id=None), 'id a number or text'),
        (first('images', id=[1]), 'id a number or text'),
        (first('images', id='1'), 'has numbers and texts for ids of its images; give all of them'),
        (first('images', width=None), 'width and height numbers'),
        (first('images', file_name='a' * 300), '1 images do not exist, such as'),
        (first('categories', id=None), "has {'id': None, 'name': 'cat'} among its categories"),
        (first('categories', id='1'), 'has numbers and texts for ids of its categories; give all'),
        (lambda c: c['categories'].append(None), 'has None among its categories'),
        (box(area=float('nan')), 'boxes are not numbers, or their areas'),
        (box(area=4 * 20 * 20), 'as small or large, exceed their box, such as annotation 1 of'),
        (lambda c: c['images'][0].update(id=2), 'lists two images with the id 2'),
        (lambda c: c['images'][0].update(width=300), r'1.jpg (200×100, not 300×100)'),
        (lambda c: c['images'][0].update(file_name='no.jpg'), '1 images do not exist, such as'),
        (lambda c: c['categories'].reverse(), 'train and val have different categories'),
        (lambda c: c['categories'][1].update(name='cat'), 'have a name that another one has'),
        (lambda c: c.pop('annotations'), 'has no `annotations`'),
    ],
)
def test_annotations(folder, change, message):
    report = changed(folder, change)
    assert any(message in sentence for sentence in report.wrong), report.wrong


@pytest.mark.parametrize(
    ('name', 'is_wrong'),
    [
        ('a\nb', True),
        ('a\tb', True),
        ('a\u2028b', True),
        ('\ud83d', True),  # half of a character
        ('', True),
        (' ', True),
        ('猫 🐱', False),
        ('می\u200cخورد', False),
        ('x' * 30_000, False),
    ],
)
def test_names_of_categories(folder, name, is_wrong):
    for split in ('val', 'train'):
        report = changed(folder, first('categories', name=name), split)
    wrong = [f'{split}: 1 categories have a name that is empty' for split in ('train', 'val')]
    assert [said.split(' or ')[0] for said in report.wrong] == wrong[: 2 * is_wrong]
    assert contact_sheet(parts_of(folder)).size == (6 * 240, 200)
    lines = format_classes(report).encode().decode().splitlines()
    assert [line.split()[-6:] for line in lines[1:]] == [list('100100'), list('011011')]
    assert max(map(len, [*lines, *report.wrong])) < 120


def test_an_edge_within_a_pixel_is_rounding(folder):
    assert changed(folder, box(bbox=[5, 5, 195.9, 20])).wrong == []


def test_what_may_be_meant_so(folder):
    def change(content):
        content['annotations'][0]['iscrowd'] = 1
        content['annotations'][1]['ignore'] = 1
        content['categories'].append({'id': 3, 'name': 'wolf'})

    changed(folder, change, 'val')
    report = changed(folder, change)
    assert report.wrong == []
    text = '\n'.join(report.notes)
    for part in ('iscrowd=1', 'marked with `ignore`', 'categories have no object, such as wolf'):
        assert part in text


def test_images(folder, monkeypatch):
    images = folder / 'images'
    (images / '1.jpg').write_bytes((images / '1.jpg').read_bytes()[:-2000])
    (images / '2.jpg').write_bytes(b'')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200 * 100)
    Image.new('RGB', (400, 200)).save(images / '12.jpg')  # as large as Pillow refuses to read
    (images / '13.jpg').write_bytes((images / '3.jpg').read_bytes())
    report = check(parts_of(folder))
    unreadable, too_large, repeated = report.wrong
    assert too_large.startswith('val: 1 images cannot be read')
    contact_sheet(parts_of(folder))
    assert unreadable.startswith(f'train: 2 images cannot be read, such as {images / "1.jpg"} (')
    (images / '1.jpg').write_bytes(b'')
    unreadable, *_ = check(parts_of(folder)).wrong
    assert f'such as {images / "1.jpg"} (not an image of a known format)' in unreadable
    assert repeated == (
        '1 image files are in several splits, byte for byte, such as 3.jpg of train = 13.jpg of val'
    )


def test_images_that_opencv_does_not_read(folder):
    """Pillow reads a TIFF of floating-point numbers."""
    Image.new('F', (64, 48)).save(folder / 'images/3.tif')
    report = changed(folder, lambda c: c['images'][2].update(file_name='3.tif'))
    (sentence,) = [text for text in report.wrong if 'cannot be read' in text]
    assert sentence.startswith('train: 1 images cannot be read')
    assert 'floating-point numbers' in sentence


def test_a_tiny_image(folder):
    Image.new('RGB', (4, 2)).save(folder / 'images/3.jpg')
    report = changed(folder, lambda c: c['images'][2].update(width=4, height=2))
    assert report.wrong == []


def test_layouts(folder, tmp_path):
    coco = tmp_path / 'coco'
    (coco / 'annotations').mkdir(parents=True)
    (folder / 'train.json').rename(coco / 'annotations/instances_train2017.json')
    (folder / 'images').rename(coco / 'train2017')
    assert parts_of(coco) == [
        Part('train2017', coco / 'annotations/instances_train2017.json', coco / 'train2017')
    ]
    assert check(parts_of(coco)).wrong == []
    with pytest.raises(ConfigError, match=r'has neither train\.json nor annotations/instances_'):
        parts_of(tmp_path)


def test_contact_sheet(folder):
    """Each class has its colour, at the edges of its boxes."""
    for number in (1, 2, 3, 11, 12, 13):
        Image.new('RGB', (200, 100)).save(folder / f'images/{number}.jpg')
    (folder / 'images/13.jpg').unlink()
    sheet = contact_sheet(parts_of(folder))
    assert sheet.size == (6 * 240, 200)
    pixels = np.asarray(sheet).reshape(200, 6, 240, 3)
    coloured = [(np.ptp(pixels[:, i].astype(int), axis=-1) > 50).any() for i in range(6)]
    assert coloured == [True, True, False, True, True, False]
    # 200 px become 236; the box from (9, 9) to (59, 59) of the second image, below the line.
    assert len({tuple(pixels[14 + round(y * 1.18), 1, round(30 * 1.18)]) for y in (9, 30, 59)}) == 2
    assert tuple(pixels[100, 5, 100]) == (128, 128, 128)
