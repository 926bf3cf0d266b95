import json

import cv2
import numpy as np
import pytest
from miniature import write_fashion_mnist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits as sklearn_digits

from mmdet_moe.datasets import digit_scenes
from mmdet_moe.datasets.digit_scenes import (
    BACKGROUNDS,
    Outline,
    crop_background,
    draw,
    generate,
    load_backgrounds,
    plan_scene,
    render_scene,
)
from mmdet_moe.datasets.sprites import (
    FASHION_CLASSES,
    load_digits,
    load_fashion_mnist,
    load_sprites,
)
from mmdet_moe.errors import ConfigError


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('scenes') / 'data'
    summary = generate(out, num_train=120, num_val=30, size=256, seed=7)
    return out, summary


def load(out, split):
    return json.loads((out / 'annotations' / f'instances_{split}2017.json').read_text())


# --- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [64, 256, 640])
def test_box_is_the_extent_of_the_changed_pixels(size):
    sprites = load_digits()['train']
    flat = [np.full((300, 300, 3), 120, np.uint8)]
    for index in range(40):
        image, placements = render_scene(3, 'train', index, size, sprites, flat, objects=(1, 1))
        rng = np.random.default_rng([3, 0, index])
        empty = crop_background(rng, flat[rng.integers(1)], size)
        rows, columns = np.nonzero((image != empty).any(axis=2))
        extent = (
            columns.min(),
            rows.min(),
            columns.max() - columns.min() + 1,
            rows.max() - rows.min() + 1,
        )
        assert placements[0].box == extent


def test_files_hold_the_rendered_scenes(data):
    out, _ = data
    sprites, photos = load_digits()['train'], load_backgrounds('train')
    annotations = load(out, 'train')['annotations']
    for index in range(5):
        image, placements = render_scene(7, 'train', index, 256, sprites, photos)
        items = [item for item in annotations if item['image_id'] == index + 1]
        assert [item['bbox'] for item in items] == [list(place.box) for place in placements]
        assert [item['category_id'] for item in items] == [p.label + 1 for p in placements]
        jpeg = cv2.imread(str(out / 'train2017' / f'{index + 1:012d}.jpg'))
        assert np.abs(jpeg.astype(int) - image).mean() < 4


def test_drawing_an_object_changes_nothing_outside_its_box():
    photos = load_backgrounds('train')
    rng = np.random.default_rng(0)
    image = crop_background(rng, photos[0], 200)
    for placement in plan_scene(rng, load_digits()['train'], 200, 6):
        before = image.copy()
        draw(image, placement, rng)
        rows, columns = np.nonzero((image != before).any(axis=2))
        x, y, width, height = placement.box
        assert x <= columns.min() <= columns.max() < x + width
        assert y <= rows.min() <= rows.max() < y + height


@pytest.mark.parametrize('target', [10, 12, 31, 95, 200])
def test_rendered_size_is_close_to_the_target(target):
    sprites = load_digits()['val']
    for sprite in sprites.images[::10]:
        height, width = Outline.of(sprite, sprites.ink).render(target).shape
        assert abs(np.sqrt(height * width) - target) <= max(1.5, 0.03 * target)


def test_alpha_touches_all_four_sides_of_its_box():
    sprites = load_digits()['train']
    for sprite in sprites.images[::50]:
        alpha = Outline.of(sprite, sprites.ink).render(50)
        for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert side.max() >= 0.2


def test_specks_shrunk_to_nearly_nothing_still_have_a_box():
    sprite = np.zeros((28, 28), np.uint8)
    sprite[0, 0] = sprite[27, 27] = 160
    assert Outline.of(sprite, (0.04, 0.6)).render(10).max() > 0


def test_ink_stands_out_from_the_background():
    sprites, photos = load_digits()['val'], load_backgrounds('val')
    weights = np.array([0.114, 0.587, 0.299])
    contrasts = []
    for index in range(60):
        image, (placement,) = render_scene(0, 'val', index, 128, sprites, photos, objects=(1, 1))
        rng = np.random.default_rng([0, 1, index])
        empty = crop_background(rng, photos[rng.integers(len(photos))], 128)
        x, y, width, height = placement.box
        window = np.s_[y : y + height, x : x + width]
        opaque = placement.alpha == 1
        ink = (image[window][opaque] @ weights).mean()
        contrasts.append(abs(ink - (empty[window].reshape(-1, 3) @ weights).mean()))
    assert min(contrasts) > 60
    assert np.mean(contrasts) > 80


def test_backgrounds_are_photographs_and_vary():
    photos = load_backgrounds('train')
    crops = [crop_background(np.random.default_rng(i), photos[0], 96) for i in range(4)]
    assert all(crop.shape == (96, 96, 3) and crop.std() > 10 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 4


# --- the splits ---------------------------------------------------------------------------------


def test_train_and_val_share_no_digit_and_no_photograph():
    splits = load_digits()
    train, val = ({image.tobytes() for image in splits[s].images} for s in ('train', 'val'))
    assert not train & val
    reference = sklearn_digits()
    assert len(splits['train'].images) + len(splits['val'].images) == len(reference.target)
    for digit in range(10):
        total = (reference.target == digit).sum()
        assert (splits['val'].labels == digit).sum() == total // 5
    assert not set(BACKGROUNDS['train']) & set(BACKGROUNDS['val'])


def test_digits_are_scikit_learns_own():
    reference = sklearn_digits()
    known = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(reference.images, reference.target, strict=True)
    }
    val = load_digits()['val']
    for image, label in zip(val.images, val.labels, strict=True):
        assert known[image.tobytes()] == label


# --- the data set -------------------------------------------------------------------------------


def test_layout_and_summary(data):
    out, summary = data
    assert summary['status'] == 'generated'
    assert sorted(path.name for path in out.iterdir()) == [
        'annotations',
        'dataset.json',
        'train2017',
        'val2017',
    ]
    assert [path.name for path in out.parent.iterdir()] == ['data']
    for split, count in (('train', 120), ('val', 30)):
        coco = load(out, split)
        names = [f'{i:012d}.jpg' for i in range(1, count + 1)]
        assert sorted(path.name for path in (out / f'{split}2017').iterdir()) == names
        assert [image['file_name'] for image in coco['images']] == names
        counts = summary['splits'][f'{split}2017']
        assert counts['images'] == count
        assert counts['objects'] == len(coco['annotations'])
        assert sum(counts['sizes'].values()) == sum(counts['classes'].values())
        assert {'info', 'licenses', 'categories'} < set(coco)


def test_objects_per_image_and_inside_the_image(data):
    out, _ = data
    coco = load(out, 'train')
    for image in coco['images']:
        boxes = [a['bbox'] for a in coco['annotations'] if a['image_id'] == image['id']]
        assert 3 <= len(boxes) <= 8
        for x, y, w, h in boxes:
            assert x >= 0
            assert y >= 0
            assert x + w <= 256
            assert y + h <= 256
            assert max(w, h) <= 0.8 * 256 + 2


def test_each_size_bin_has_a_fair_share(data):
    out, summary = data
    areas = np.array([a['area'] for a in load(out, 'train')['annotations']])
    bins = {
        'small': (areas < 32**2).sum(),
        'medium': ((areas >= 32**2) & (areas <= 96**2)).sum(),
        'large': (areas > 96**2).sum(),
    }
    assert bins == summary['splits']['train2017']['sizes']
    assert min(bins.values()) >= 0.2 * len(areas)


def test_overlap_limit_counted_in_pixels(data):
    out, _ = data
    coco = load(out, 'train')
    for image in coco['images']:
        masks = []
        for item in coco['annotations']:
            if item['image_id'] == image['id']:
                x, y, w, h = item['bbox']
                mask = np.zeros((256, 256), bool)
                mask[y : y + h, x : x + w] = True
                assert item['area'] == mask.sum()
                masks.append(mask)
        for i, a in enumerate(masks):
            for b in masks[:i]:
                assert (a & b).sum() <= 0.2 * min(a.sum(), b.sum())


def test_pycocotools_reads_it_and_scores_the_truth_as_perfect(data, capsys):
    out, _ = data
    coco = COCO(str(out / 'annotations' / 'instances_val2017.json'))
    assert coco.getCatIds() == list(range(1, 11))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list('0123456789')
    truth = [
        {key: item[key] for key in ('image_id', 'category_id', 'bbox')} | {'score': 1.0}
        for item in coco.dataset['annotations']
    ]
    evaluation = COCOeval(coco, coco.loadRes(truth), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    # AP, AP50, AP75 and AP of small, medium and large objects.
    assert evaluation.stats[:6] == pytest.approx(1.0)


def test_same_parameters_give_the_same_bytes(tmp_path):
    for name in ('a', 'b'):
        generate(tmp_path / name, 4, 2, size=96, seed=5)
    assert files_of(tmp_path / 'a') == files_of(tmp_path / 'b')
    generate(tmp_path / 'c', 4, 2, size=96, seed=6)
    first = 'train2017/000000000001.jpg'
    assert files_of(tmp_path / 'a')[first] != files_of(tmp_path / 'c')[first]


def test_a_small_data_set_is_the_beginning_of_a_large_one(tmp_path):
    generate(tmp_path / 'small', 3, 2, size=96, seed=5)
    generate(tmp_path / 'large', 6, 4, size=96, seed=5)
    small, large = files_of(tmp_path / 'small'), files_of(tmp_path / 'large')
    images = [name for name in small if name.endswith('.jpg')]
    assert len(images) == 5
    assert all(small[name] == large[name] for name in images)
    for split in ('train', 'val'):
        for part in ('images', 'annotations'):
            beginning = load(tmp_path / 'small', split)[part]
            assert load(tmp_path / 'large', split)[part][: len(beginning)] == beginning


def test_small_images_hold_small_and_medium_objects(tmp_path):
    summary = generate(tmp_path / 'data', 20, 1, size=64, seed=0, objects=(2, 3))
    sizes = summary['splits']['train2017']['sizes']
    assert sizes['large'] == 0
    assert sizes['small'] > 0
    assert sizes['medium'] > 0


# --- an output folder that exists ---------------------------------------------------------------


def test_already_there(tmp_path):
    first = generate(tmp_path / 'data', 2, 1, size=64, seed=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'data').rglob('*')}
    second = generate(tmp_path / 'data', 2, 1, size=64, seed=0)
    assert second['status'] == 'already there'
    assert second['splits'] == first['splits']
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'data').rglob('*')}


def test_other_parameters_need_overwrite(tmp_path):
    generate(tmp_path / 'data', 2, 1, size=64, seed=0)
    with pytest.raises(ConfigError, match=r'seed is 0, asked for 1.*--overwrite'):
        generate(tmp_path / 'data', 2, 1, size=64, seed=1)
    summary = generate(tmp_path / 'data', 3, 1, size=64, seed=1, overwrite=True)
    assert summary['splits']['train2017']['images'] == 3
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_incomplete_data_set_is_told(tmp_path):
    generate(tmp_path / 'data', 2, 1, size=64, seed=0)
    (tmp_path / 'data' / 'train2017' / '000000000002.jpg').unlink()
    with pytest.raises(ConfigError, match=r'train2017 holds 1 of 2 images.*--overwrite'):
        generate(tmp_path / 'data', 2, 1, size=64, seed=0)
    assert generate(tmp_path / 'data', 2, 1, 64, 0, overwrite=True)['status'] == 'generated'


def test_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / 'thesis.txt').write_text('the only copy')
    with pytest.raises(ConfigError, match='no digit-scenes data set'):
        generate(tmp_path, 2, 1, size=64, seed=0, overwrite=True)
    assert (tmp_path / 'thesis.txt').read_text() == 'the only copy'


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    generate(tmp_path / 'old', 2, 1, size=64, seed=0)
    before = files_of(tmp_path / 'old')
    monkeypatch.setattr(digit_scenes.cv2, 'imwrite', lambda *_: False)
    with pytest.raises(OSError, match='could not be written'):
        generate(tmp_path / 'new', 2, 1, size=64, seed=0)
    with pytest.raises(OSError, match='could not be written'):
        generate(tmp_path / 'old', 2, 1, size=64, seed=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ['old']
    assert files_of(tmp_path / 'old') == before


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_train': 0}, 'num_train .* at least 1, not 0'),
        ({'size': 32}, 'size must be 64 to 4096 px, not 32'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'objects': (5, 3)}, 'such as 3 8, not 5 3'),
        ({'objects': (0, 3)}, 'objects must be'),
        ({'sprites': 'letters'}, "one of digits, fashion-mnist, not 'letters'"),
        ({'sprites': 'fashion-mnist'}, 'need source'),
        ({'source': 'here'}, 'only for fashion-mnist'),
    ],
)
def test_bad_parameters(tmp_path, changes, message):
    parameters = {'num_train': 2, 'num_val': 1, 'size': 64, 'seed': 0} | changes
    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / 'data', **parameters)
    assert not list(tmp_path.iterdir())


# --- Fashion-MNIST ------------------------------------------------------------------------------


def test_fashion_mnist_scenes(tmp_path):
    write_fashion_mnist(tmp_path, num_train=10, num_test=5, gz=True)
    sets = load_sprites('fashion-mnist', tmp_path)
    assert [len(sets[split].images) for split in ('train', 'val')] == [10, 5]
    out = tmp_path / 'data'
    summary = generate(out, 4, 2, 128, 0, sprites='fashion-mnist', source=tmp_path)
    assert tuple(summary['splits']['train2017']['classes']) == FASHION_CLASSES
    assert load(out, 'train')['categories'][0]['name'] == 'T-shirt/top'
    # Other files under the same names are other parameters.
    write_fashion_mnist(tmp_path, num_train=9, num_test=5, gz=True)
    with pytest.raises(ConfigError, match='sprites_sha256'):
        generate(out, 4, 2, 128, 0, sprites='fashion-mnist', source=tmp_path)


def test_fashion_mnist_files_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r'train-images-idx3-ubyte \(or the same with .gz\)'):
        load_fashion_mnist(tmp_path)
    write_fashion_mnist(tmp_path, num_test=5)
    labels = tmp_path / 't10k-labels-idx1-ubyte'
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + b'\x0a')
    with pytest.raises(ConfigError, match='holds the label 10'):
        load_fashion_mnist(tmp_path)
    labels.write_bytes(content[:4] + b'\x00\x00\x00\x03' + content[8:-2])
    with pytest.raises(ConfigError, match=r'5 images but .* holds 3 labels'):
        load_fashion_mnist(tmp_path)
