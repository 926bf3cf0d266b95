"""Images and classes of COCO as a data set of their own, from annotations written by hand."""

import json

import pytest
from PIL import Image

from mmdet_moe.datasets.coco_folder import NOTE
from mmdet_moe.datasets.coco_part import prepare_coco_part
from mmdet_moe.errors import ConfigError


@pytest.fixture
def coco(tmp_path):
    """Three images in both of COCO's splits: persons, a crowd, and a cat."""
    entries = {
        'train2017': [('000000000009', [(1, [0, 0, 10, 5], 0), (17, [1, 1, 2, 2], 0)])],
        'val2017': [('000000000139', [(1, [4, 2, 8, 8], 1)]), ('000000000007', [])],
    }
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    for split, images in entries.items():
        (folder / split).mkdir()
        content = {
            'images': [],
            'annotations': [],
            'categories': [{'id': 1, 'name': 'person'}, {'id': 17, 'name': 'cat'}],
        }
        for name, boxes in images:
            Image.new('RGB', (40, 20)).save(folder / split / f'{name}.jpg')
            image = {'id': int(name), 'file_name': f'{name}.jpg', 'width': 40, 'height': 20}
            content['images'].append(image)
            content['annotations'] += [
                {
                    'id': 100 * int(name) + i, 'image_id': int(name), 'category_id': category,
                    'bbox': box, 'area': box[2] * box[3], 'iscrowd': crowd,
                }
                for i, (category, box, crowd) in enumerate(boxes)
            ]  # fmt: skip
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    for split, ids in {'train': '000000000139\n', 'val': '000000000009\n'}.items():
        (tmp_path / f'{split}.txt').write_text(ids)
    return folder


def prepare(coco, **kwargs):
    files = [coco.parent / 'train.txt', coco.parent / 'val.txt']
    options = {'ids': files, 'classes': ['person'], 'size': 20, **kwargs}
    return prepare_coco_part(coco.parent / 'out', coco, **options)


def test_ids_come_of_both_splits_with_one_class(coco):
    status, counts = prepare(coco)
    assert status == 'written'
    assert [counts[split]['images'] for split in ('train', 'val')] == [1, 1]
    out = coco.parent / 'out'
    train, val = (json.loads((out / f'{split}.json').read_text()) for split in ('train', 'val'))
    # At half the size.
    ((crowd,), (person,)) = (content['annotations'] for content in (train, val))
    assert (crowd['bbox'], crowd['iscrowd']) == ([2, 1, 4, 4], 1)
    assert (person['bbox'], person['iscrowd']) == ([0, 0, 5, 2.5], 0)
    assert val['categories'] == [{'id': 1, 'name': 'person'}]
    assert (out / 'images' / val['images'][0]['file_name']).is_file()
    assert prepare(coco)[0] == 'already there'


def test_areas_are_those_of_the_masks(coco):
    """At half the size a quarter of them; without one that of the box."""
    file = coco / 'annotations/instances_train2017.json'
    content = json.loads(file.read_text())
    person, cat = content['annotations']
    person['area'] = 30
    del cat['area']
    file.write_text(json.dumps(content))
    prepare(coco, classes=[])
    val = json.loads((coco.parent / 'out/val.json').read_text())
    assert [box['area'] for box in val['annotations']] == [7.5, 1]
    note = coco.parent / 'out' / NOTE
    content = json.loads(note.read_text())
    del content['made_of']['areas']  # as of a version that wrote those of boxes
    note.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match='one made with other options: choose another --out'):
        prepare(coco, classes=[])


def test_all_classes(coco):
    prepare(coco, classes=[])
    val = json.loads((coco.parent / 'out/val.json').read_text())
    assert val['categories'] == [{'id': 1, 'name': 'person'}, {'id': 2, 'name': 'cat'}]
    assert [box['category_id'] for box in val['annotations']] == [1, 2]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda coco: {'classes': ['dog']}, "no class 'dog'"),
        (lambda coco: {'classes': ['cat', 'cat']}, 'give different names'),
        (lambda coco: {'ids': [coco.parent / 'val.txt']}, 'takes two files'),
        (lambda coco: {'ids': [coco.parent / 'val.txt'] * 2}, 'both files list 000000000009'),
        (lambda coco: (coco / 'val2017/000000000139.jpg').unlink(), 'there is no .*139.jpg'),
        (
            lambda coco: (coco / 'annotations/instances_val2017.json').unlink(),
            r'000000000139 \(1 in all\) is not in the annotations',
        ),
        (
            lambda coco: (coco / 'annotations/instances_val2017.json').write_text('{'),
            'is not JSON',
        ),
    ],
)
def test_mistakes(coco, change, message):
    # Some change the options, the others the disk.
    options = change(coco)
    options = options if isinstance(options, dict) else {}
    with pytest.raises(ConfigError, match=message):
        prepare(coco, **options)
    assert not (coco.parent / 'out/train.json').exists()
