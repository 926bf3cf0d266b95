"""The payload: its columns, the choice of the pool, its budget, and damaged files."""

import base64
import json

import cv2
import numpy as np
import pytest
from explorer_runs import classification_run, detection_run

from mmdet_moe.analysis.report.explorer import (
    build_payload,
    read_payload,
    write_payload,
    write_report,
)
from mmdet_moe.analysis.report.explorer.packing import (
    in_steps,
    pack,
    quantise,
    quantise_weights,
    unpack,
)
from mmdet_moe.analysis.report.explorer.pool import SAMPLE, random_keys
from mmdet_moe.analysis.statistics.matching import CORRECT
from mmdet_moe.errors import ConfigError


@pytest.fixture(scope='module')
def run():
    return detection_run(num_images=60)


@pytest.fixture(scope='module')
def payload(run):
    return build_payload(run.experts, run.outcomes, run.load_image)


def pool_rows(payload):
    return unpack(payload['pool']['rows'])


def decode(jpeg):
    return cv2.imdecode(np.frombuffer(base64.b64decode(jpeg), np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int32', 'float32'])
@pytest.mark.parametrize('shape', [(0,), (5,), (3, 4)])
def test_packed_arrays_come_back(dtype, shape):
    array = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    packed = json.loads(json.dumps(pack(array)))
    result = unpack(packed)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_weights_are_rounded_to_steps_of_1_254_and_nan_stays_apart():
    weights = np.array([0, 1, 0.5, 1 / 254, np.nan, 1.0001], np.float32)
    assert quantise(weights).tolist() == [0, 254, 127, 1, 255, 254]


def test_a_weight_above_0_is_not_0():
    large = np.array([[0.5, 0.5, 0], [1, 0, np.nan]], np.float32)
    assert quantise_weights(large).tolist() == [[127, 127, 0], [254, 0, 255]]
    small = np.array([[1e-3, 1 - 1e-3, 0], [1e-9, 1, np.nan]], np.float32)
    packed = quantise_weights(small)
    assert packed.dtype == np.uint16
    assert (packed[~np.isnan(small)] > 0).tolist() == (small[~np.isnan(small)] > 0).tolist()
    steps = in_steps(packed)
    np.testing.assert_allclose(steps[0] / 254, small[0], atol=1e-5)
    assert steps[1, 2] == 255


def test_columns_equal_the_outcomes(run, payload):
    outcomes, columns = run.outcomes, payload['columns']
    for name in (
        'image',
        'is_detection',
        'label',
        'true_label',
        'kind',
        'partner',
        'size',
        'level',
    ):
        np.testing.assert_array_equal(unpack(columns[name]), getattr(outcomes, name))
    np.testing.assert_allclose(unpack(columns['box']), outcomes.box, atol=0.5)
    np.testing.assert_allclose(unpack(columns['loss']), outcomes.loss, atol=0.0005)
    for name in ('score', 'iou'):
        steps, values = unpack(columns[name]), getattr(outcomes, name)
        missed = np.isnan(values)
        assert (steps[missed] == 255).all()
        np.testing.assert_allclose(steps[~missed] / 254, values[~missed], atol=0.5 / 254)
    for layer, weights in outcomes.weights.items():
        steps = unpack(columns['weights'][layer])
        unknown = np.isnan(weights)
        assert (steps[unknown] == 255).all()
        np.testing.assert_allclose(steps[~unknown] / 254, weights[~unknown], atol=0.5 / 254 + 1e-6)


def test_tables_of_the_associations_are_kept_as_counts(run, payload):
    for name, layer in run.experts['layers'].items():
        for source, attributes in layer['associations'].items():
            for attribute, table in attributes.items():
                packed = payload['layers'][name]['associations'][source][attribute]
                assert packed['mi'] == table['mi']
                assert 'expert_given_bin' not in packed
                if 'counts' in table:
                    counts = unpack(packed['counts'])
                    np.testing.assert_allclose(counts, table['counts'], rtol=1e-6)


def test_every_crop_has_its_whole_image(run, payload):
    rows = pool_rows(payload)
    assert len(set(rows.tolist())) == len(rows) == len(payload['pool']['crops']) > 0
    images = {str(i) for i in run.outcomes.image[rows]}
    assert images == set(payload['pool']['images'])
    for width, height, jpeg in payload['pool']['images'].values():
        assert (width, height) == (run.width, run.height)
        assert decode(jpeg).shape == (run.height, run.width, 3)


def test_large_images_are_made_smaller_and_keep_their_shape():
    run = detection_run(num_images=3, size=(1000, 500))
    payload = build_payload(run.experts, run.outcomes, run.load_image)
    for width, height, jpeg in payload['pool']['images'].values():
        assert (width, height) == (1000, 500)
        assert decode(jpeg).shape == (240, 480, 3)
    assert max(max(decode(crop).shape) for crop in payload['pool']['crops']) <= 96


def test_crops_show_the_box(run, payload):
    regions = unpack(payload['pool']['regions'])
    for row, region in zip(pool_rows(payload), regions, strict=True):
        x1, y1, x2, y2 = region
        assert 0 <= x1 < x2 <= run.width
        assert 0 <= y1 < y2 <= run.height
        shown = [row]
        if run.outcomes.kind[row] == CORRECT:  # with the detection, which has no crop of its own
            assert not run.outcomes.is_detection[row]
            shown.append(row + run.outcomes.partner[row])
        for box in run.outcomes.box[shown]:
            assert (region[:2] <= np.ceil(box[:2])).all()
            assert (region[2:] >= np.minimum(np.floor(box[2:]), [run.width, run.height])).all()
    # The mean colours are those of that part of the image, and red is red.
    for i in range(0, len(regions), 29):
        x1, y1, x2, y2 = regions[i]
        image = run.load_image(int(run.outcomes.image[pool_rows(payload)[i]]))
        crop = decode(payload['pool']['crops'][i])[..., ::-1]
        expected = image[y1:y2, x1:x2].mean(axis=(0, 1))
        np.testing.assert_allclose(crop.mean(axis=(0, 1)), expected, atol=3)


@pytest.mark.parametrize('budget', [9_000_000, 600_000])
def test_every_expert_has_a_row_of_its_highest_weight(run, budget):
    payload = build_payload(run.experts, run.outcomes, run.load_image, budget)
    outcomes = run.outcomes
    stored = np.isin(np.arange(len(outcomes)), pool_rows(payload))
    shared = outcomes.is_detection & (outcomes.kind == CORRECT)
    stored |= shared & stored[np.arange(len(outcomes)) + outcomes.partner]
    for weights in outcomes.weights.values():
        steps = np.rint(np.nan_to_num(weights) * 254)
        for population in (False, True):
            rows = outcomes.is_detection == population
            assert (steps[rows & stored].max(axis=0) == steps[rows].max(axis=0)).all()


def test_an_expert_has_rows_of_many_images(run):
    payload = build_payload(run.experts, run.outcomes, run.load_image, 600_000)
    rows = pool_rows(payload)
    for weights in run.outcomes.weights.values():
        for column in np.nan_to_num(weights).T:
            best = rows[column[rows] >= np.quantile(column[column > 0], 0.9)]
            assert len(set(run.outcomes.image[best].tolist())) >= 3


def test_filters_find_something_where_there_is_something():
    run = detection_run(num_images=400, layers=(('cls', 4),))
    payload = build_payload(run.experts, run.outcomes, run.load_image, 2_500_000)
    rows = pool_rows(payload)
    assert len(rows) < len(run.outcomes) / 2
    outcomes = run.outcomes
    bins = np.digitize(outcomes.size, [32, 96])
    own = np.flatnonzero(~(outcomes.is_detection & (outcomes.kind == CORRECT)))
    what = outcomes.kind + 7 * outcomes.is_detection

    def cells(rows):
        return set(zip(outcomes.counted_label[rows], bins[rows], what[rows], strict=True))

    assert cells(rows) == cells(own)
    steps = np.rint(np.nan_to_num(outcomes.weights['cls']) * 254)
    for expert in range(4):
        took_part = own[steps[own, expert] > 0]
        everywhere = set(zip(bins[took_part], what[took_part], strict=True))
        here = rows[steps[rows, expert] > 0]
        assert set(zip(bins[here], what[here], strict=True)) == everywhere


def test_the_random_sample_has_pictures():
    """Of the rows of an expert those that are first in the random order, one of each image."""
    run = detection_run(num_images=400, layers=(('cls', 4),))
    outcomes = run.outcomes
    stored = set(
        pool_rows(build_payload(run.experts, outcomes, run.load_image, 3_000_000)).tolist()
    )
    keys = random_keys(outcomes.image)
    assert len(set(keys.tolist())) > 0.99 * len(keys)
    assert not np.array_equal(keys, random_keys(outcomes.image, seed=1))
    place = np.arange(len(keys)) - np.searchsorted(outcomes.image, outcomes.image)
    part = np.arange(len(outcomes)) // 2 * 2 < 200  # also of a part of the images
    part = np.isin(outcomes.image, outcomes.image[part])
    assert np.array_equal(random_keys(outcomes.image[part]), keys[part])
    assert abs(np.corrcoef(keys, outcomes.image)[0, 1]) < 0.1
    assert abs(np.corrcoef(keys % 4096, place)[0, 1]) < 0.05
    steps = np.rint(np.nan_to_num(outcomes.weights['cls']) * 254)
    for expert in range(4):
        for population in (False, True):
            rows = np.flatnonzero((steps[:, expert] > 0) & (outcomes.is_detection == population))
            seen, sample = set(), []
            for row in rows[np.argsort(keys[rows])].tolist():
                if outcomes.image[row] not in seen:
                    seen.add(outcomes.image[row])
                    sample.append(row)
            sample = np.array(sample[:SAMPLE])
            shared = population & (outcomes.kind[sample] == CORRECT)
            assert set((sample + shared * outcomes.partner[sample]).tolist()) <= stored


@pytest.mark.parametrize('budget', [1_000_000, 300_000, 100_000])
def test_the_budget_is_kept_and_used(tmp_path, budget):
    run = detection_run(num_images=150)
    write_payload(
        build_payload(run.experts, run.outcomes, run.load_image, budget), tmp_path / 'x.json'
    )
    assert 0.8 * budget < (tmp_path / 'x.json').stat().st_size <= budget


def test_too_many_outcomes_are_thinned_by_whole_images(tmp_path):
    run = detection_run(num_images=3000, objects_per_image=8)
    budget = 400_000
    payload = build_payload(run.experts, run.outcomes, run.load_image, budget)
    write_payload(payload, tmp_path / 'x.json')
    assert (tmp_path / 'x.json').stat().st_size <= budget
    image = unpack(payload['columns']['image'])
    assert payload['rows'] == {'kept': len(image), 'all': len(run.outcomes)}
    assert 0 < len(image) < len(run.outcomes)
    kept, counts = np.unique(image, return_counts=True)
    np.testing.assert_array_equal(counts, np.bincount(run.outcomes.image)[kept])
    assert len(payload['pool']['crops']) > 0


def test_statistics_are_kept_where_the_budget_is_too_small_for_anything_else(run):
    payload = build_payload(run.experts, run.outcomes, run.load_image, 10)
    assert payload['rows'] == {'kept': 0, 'all': len(run.outcomes)}
    assert payload['pool']['crops'] == []
    assert list(payload['layers']) == list(run.experts['layers'])


def test_the_choice_is_deterministic():
    runs = [detection_run(num_images=80) for _ in range(2)]
    first, second = (build_payload(r.experts, r.outcomes, r.load_image, 300_000) for r in runs)
    assert first == second
    assert runs[0].loaded == runs[1].loaded


def test_an_image_that_is_gone_costs_nothing_else():
    run = detection_run(num_images=30)
    whole = build_payload(run.experts, run.outcomes, run.load_image)

    def load_image(index):
        if index in (3, 7):
            raise ConfigError(f'cannot read the image {index}')
        return run.load_image(index)

    payload = build_payload(run.experts, run.outcomes, load_image)
    assert sorted(payload['pool']['unreadable']) == [
        'cannot read the image 3', 'cannot read the image 7'
    ]  # fmt: skip
    expected = set(whole['pool']['images']) - {'3', '7'}
    assert set(payload['pool']['images']) == expected
    assert payload['columns'] == whole['columns']


def test_files_are_named_from_the_folder_of_the_report(tmp_path):
    run = detection_run(num_images=4)
    paths = {0: tmp_path / 'data/a/1.jpg', 1: tmp_path / 'data/b/2.jpg'}
    payload = build_payload(
        run.experts, run.outcomes, run.load_image,
        path_of=lambda i: str(paths[i]) if i in paths else None, folder=tmp_path / 'out' / 'one',
    )  # fmt: skip
    assert payload['files'] == {
        'folder': '../../data/', 'names': {'0': 'a/1.jpg', '1': 'b/2.jpg'}
    }  # fmt: skip
    (tmp_path / 'out' / 'one').mkdir(parents=True)
    path = tmp_path / 'out' / 'one' / 'explorer.json'
    write_payload(payload, path)
    assert read_payload(path)['files']['folder'] == '../../data/'
    # Beside another run, in a report that lies elsewhere.
    assert read_payload(path, tmp_path / 'two')['files']['folder'] == '../data/'
    remote = build_payload(
        run.experts, run.outcomes, run.load_image, path_of=lambda i: f's3://bucket/{i}.jpg'
    )
    assert remote['files'] == {
        'folder': '', 'names': {str(i): f's3://bucket/{i}.jpg' for i in range(4)}
    }  # fmt: skip


def test_no_image_is_loaded_twice():
    run = detection_run(num_images=80)
    build_payload(run.experts, run.outcomes, run.load_image, 2_000_000)
    assert len(set(run.loaded)) == len(run.loaded)


def test_a_classifier_shows_whole_images():
    run = classification_run(num_images=30, num_classes=5, experts=2)
    payload = build_payload(run.experts, run.outcomes, run.load_image)
    assert sorted(pool_rows(payload).tolist()) == list(range(30))
    regions = unpack(payload['pool']['regions'])
    assert (regions == [0, 0, run.width, run.height]).all()


def test_many_layers_of_many_experts_share_the_images():
    layers = tuple((f'layer{i}', 64) for i in range(5))
    run = detection_run(num_images=120, layers=layers)
    payload = build_payload(run.experts, run.outcomes, run.load_image, 3_000_000)
    rows = pool_rows(payload)
    for weights in run.outcomes.weights.values():
        active = np.nan_to_num(weights).max(axis=0) > 0.5 / 254
        assert (np.nan_to_num(weights[rows]).max(axis=0) > 0)[active].all()


def test_layers_without_rows_and_runs_without_outcomes():
    run = detection_run(num_images=4, backbone=True)
    run.outcomes.weights['backbone.layer4'] = np.full((len(run.outcomes), 4), np.nan, np.float32)
    payload = build_payload(run.experts, run.outcomes, run.load_image)
    assert 'backbone.layer4' in payload['layers']
    assert 'backbone.layer4' not in payload['columns']['weights']
    empty = detection_run(num_images=4)
    for name, column in vars(empty.outcomes).items():
        if name != 'weights':
            setattr(empty.outcomes, name, column[:0])
    empty.outcomes.weights = {k: v[:0] for k, v in empty.outcomes.weights.items()}
    for budget in (9_000_000, 10):
        payload = build_payload(empty.experts, empty.outcomes, empty.load_image, budget)
    assert payload['rows'] == {'kept': 0, 'all': 0}
    assert payload['pool']['crops'] == []


def test_weights_of_another_shape_are_refused():
    run = detection_run(num_images=4)
    run.outcomes.weights['bbox_head.cls_moe'] = run.outcomes.weights['bbox_head.cls_moe'][:, :3]
    with pytest.raises(ValueError, match=r'bbox_head\.cls_moe'):
        build_payload(run.experts, run.outcomes, run.load_image)


# Files ---------------------------------------------------------------------------------------


def test_a_written_payload_is_read_back(payload, tmp_path):
    path = tmp_path / 'explorer.json'
    write_payload(payload, path)
    assert read_payload(path) == {**payload, 'folder': str(tmp_path)}
    assert [p.name for p in tmp_path.iterdir()] == ['explorer.json']


def test_runs_of_one_config_and_iteration_are_told_apart_by_their_folders(payload, tmp_path):
    for name in ('one', 'two'):
        (tmp_path / name / 'experts').mkdir(parents=True)
    write_payload(payload, tmp_path / 'two' / 'experts' / 'explorer.json')
    other = read_payload(tmp_path / 'two' / 'experts' / 'explorer.json')
    report = tmp_path / 'one' / 'experts' / 'report.html'
    write_report([payload, other], report)
    page, run = report.read_text(), payload['run']
    for name in ('one', 'two'):
        assert f'{run["config"]} · {run["checkpoint"]} · {name}/experts</h2>' in page
    assert str(tmp_path) not in page


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'explorer.json'
    path.write_text('old')
    with pytest.raises(TypeError):
        write_payload({'x': object()}, path)
    assert path.read_text() == 'old'
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (None, 'does not exist'),
        ('{"schema": "mmdet', 'damaged'),
        (b'\xff\xfe\x00', 'damaged'),
        ('[]', 'no payload'),
        ('{"schema": "mmdet_moe.experts", "version": 1}', 'no payload'),
        ('{"schema": "mmdet_moe.explorer", "version": 99}', 'version 99'),
        ('{"schema": "mmdet_moe.explorer", "version": 2}', 'no run, metrics'),
    ],
)
def test_wrong_files_give_one_sentence(tmp_path, content, says):
    path = tmp_path / 'explorer.json'
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        read_payload(path)
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_folder_is_no_payload(tmp_path):
    with pytest.raises(ConfigError, match='cannot be read'):
        read_payload(tmp_path)


@pytest.mark.parametrize('damage', ['column', 'length', 'field', 'crops', 'weights'])
def test_a_damaged_column_gives_one_sentence(payload, tmp_path, damage):
    broken = json.loads(json.dumps(payload))
    columns = broken['columns']
    if damage == 'column':
        columns['label']['data'] = columns['label']['data'][:-8]
    elif damage == 'length':
        columns['kind'] = pack(np.zeros(3, np.uint8))
    elif damage == 'field':
        del columns['partner']
    elif damage == 'crops':
        broken['pool']['crops'].pop()
    else:
        columns['weights']['bbox_head.cls_moe']['data'] = '!'
    path = tmp_path / 'explorer.json'
    write_payload(broken, path)
    with pytest.raises(ConfigError, match='damaged') as caught:
        read_payload(path)
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)
