"""The report in a browser: it shows what NumPy finds in the outcomes, by mouse and by keys."""

import csv
import itertools
import json
import re

import numpy as np
import pytest
from explorer_runs import classification_run, detection_run

from mmdet_moe.analysis.report.explorer import build_payload, write_report
from mmdet_moe.analysis.report.explorer.pool import SAMPLE, random_keys
from mmdet_moe.analysis.statistics.matching import (
    BACKGROUND,
    CLASSIFICATION,
    CORRECT,
    KINDS,
    LOCALISATION,
    MISSED,
)
from mmdet_moe.errors import ConfigError

TIMEOUT = 60_000
MARKUP = '</script><script>window.broken = 1</script>'
CLASSES = ('=cat', 'dog & "cup"', '<b>bold</b>', MARKUP)
SUPERCLASSES = {'animals <i>': [0, 1], 'things': [2, 3]}
LAYER, BACKBONE = 'bbox_head.cls_moe', 'backbone.layer4'


def make_report(folder, *runs, budget=9_000_000):
    payloads = [
        build_payload(
            r.experts, r.outcomes, r.load_image, budget,
            path_of=lambda i: str(folder / f'my data/val #1/img_{i:03d}.jpg'), folder=folder,
        )
        for r in runs
    ]  # fmt: skip
    path = folder / 'report.html'
    write_report(payloads, path)
    return path


@pytest.fixture(scope='module')
def soft():
    return detection_run(classes=CLASSES, superclasses=SUPERCLASSES, backbone=True)


@pytest.fixture(scope='module')
def hard():
    return detection_run('retinanet_moe_hard', layers=((LAYER, 12),), sharpness=0.5, seed=3)


@pytest.fixture(scope='module')
def single_report(soft, tmp_path_factory):
    # So little that a part of the crops is left out.
    return make_report(tmp_path_factory.mktemp('single'), soft, budget=500_000)


@pytest.fixture(scope='module')
def double_report(soft, hard, tmp_path_factory):
    return make_report(tmp_path_factory.mktemp('double'), soft, hard)


@pytest.fixture(scope='module')
def classifier():
    return classification_run()


@pytest.fixture(scope='module')
def classifier_report(classifier, tmp_path_factory):
    return make_report(tmp_path_factory.mktemp('classifier'), classifier)


@pytest.fixture
def open_report(browser):
    """Open a report without a network; the test fails on any error or request of the page."""
    contexts, problems = [], []

    def open_(path, width=1280, height=900, hash='', **options):
        context = browser.new_context(
            viewport={'width': width, 'height': height}, offline=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on('pageerror', lambda error: problems.append(f'page error: {error}'))
        page.on(
            'console',
            lambda message: (
                problems.append(f'{message.type}: {message.text}')
                if message.type in ('error', 'warning')
                else None
            ),
        )
        page.on(
            'request',
            lambda request: (
                problems.append(f'request: {request.url[:80]}')
                if not request.url.startswith(('file:', 'data:', 'blob:'))
                else None
            ),
        )
        page.goto(path.as_uri() + hash)
        page.wait_for_selector('html[data-ready]')
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


# What NumPy says -----------------------------------------------------------------------------


def expected_rows(run, layer, expert, sizes=(0, 1, 2), kinds=range(7), labels=None, detections=0):
    """Rows that an expert took part in, after the filters."""
    outcomes = run.outcomes
    rows = outcomes.weights[layer][:, expert] > 0
    rows &= outcomes.is_detection == detections
    rows &= np.isin(outcomes.kind, list(kinds))
    if len(sizes) < 3:
        small, large = outcomes.size < 32, outcomes.size >= 96
        rows &= np.isin(np.where(small, 0, np.where(large, 2, 1)), sizes)
    if labels is not None:
        rows &= np.isin(outcomes.counted_label, labels)
    return np.flatnonzero(rows)


def counts(page, run=0):
    """(shown, matching) as the page says."""
    text = page.locator('.run').nth(run).locator('.count').inner_text()
    found = re.match(r'([\d,]+) of ([\d,]+) \w+ shown', text)
    return tuple(int(group.replace(',', '')) for group in found.groups())


def shown_rows(page, run=0):
    return (
        page.locator('.run')
        .nth(run)
        .locator('.tile')
        .evaluate_all('tiles => tiles.map(tile => Number(tile.dataset.row))')
    )


def chart_values(page, name, run=0, axis='y'):
    """The bars of a chart, once the latest choice is drawn."""
    card = page.locator('.run').nth(run).locator(f'[data-chart={name}]')
    card.scroll_into_view_if_needed()
    page.wait_for_function(
        '([run, name]) => document.querySelectorAll(".run")[run]'
        '.querySelector(`[data-chart=${name}] .chart`).data',
        arg=[run, name],
    )
    page.evaluate('() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))')
    return card.locator('.chart').evaluate(f'div => Array.from(div.data[0].{axis})')


def choose_expert(page, expert, run=0):
    page.locator('.run').nth(run).locator(f'.expert[data-expert="{expert}"]').click()


def wait_for_focus(page, row):
    """A dialog tells of its end in an event of its own, after it has been hidden."""
    page.wait_for_function(f'() => document.activeElement.dataset.row === "{row}"')


def chosen_expert(page, run=0):
    chosen = page.locator('.run').nth(run).locator('.expert[aria-checked=true]')
    return int(chosen.get_attribute('data-expert'))


# One run -------------------------------------------------------------------------------------


def test_it_opens_without_a_network_at_a_layer_that_has_images(open_report, soft, single_report):
    page = open_report(single_report)
    assert page.locator('select.layer').input_value() == LAYER
    assert chosen_expert(page) == int(np.argmax(soft.experts['layers'][LAYER]['load']))
    shown, matching = counts(page)
    assert shown == len(shown_rows(page)) > 0
    assert matching == len(expected_rows(soft, LAYER, chosen_expert(page)))
    title = f'What expert {chosen_expert(page)} works on'
    assert page.get_by_role('heading', name=title, exact=True).is_visible()


def test_another_expert_changes_wall_and_histograms(open_report, soft, single_report):
    page = open_report(single_report)
    weights = np.rint(np.nan_to_num(soft.outcomes.weights[LAYER]) * 254)
    objects = ~soft.outcomes.is_detection
    known = objects & ~np.isnan(soft.outcomes.weights[LAYER][:, 0])
    seen = []
    for expert in range(4):
        choose_expert(page, expert)
        rows = expected_rows(soft, LAYER, expert)
        assert counts(page)[1] == len(rows)
        shown = shown_rows(page)
        assert set(shown) <= set(rows.tolist())
        # The highest weight of all comes first, no lower one before a higher one, no image twice.
        steps = weights[shown, expert]
        assert steps[0] == weights[objects, expert].max()
        assert (np.diff(steps) <= 0).all()
        assert len(set(soft.outcomes.image[shown].tolist())) == len(shown)
        seen.append(tuple(shown))
        total = weights[known, expert].sum()
        level, label = soft.outcomes.level, soft.outcomes.true_label
        by_level = [weights[known & (level == i), expert].sum() / total for i in range(5)]
        np.testing.assert_allclose(chart_values(page, 'level'), by_level, atol=1e-6)
        by_class = [weights[known & (label == i), expert].sum() / total for i in range(4)]
        np.testing.assert_allclose(chart_values(page, 'class', axis='x'), by_class, atol=1e-6)
    assert len(set(seen)) == 4


def test_another_layer(open_report, soft, single_report):
    page = open_report(single_report)
    page.locator('select.layer').select_option('bbox_head.reg_moe')
    expert = int(np.argmax(soft.experts['layers']['bbox_head.reg_moe']['load']))
    rows = expected_rows(soft, 'bbox_head.reg_moe', expert)
    page.wait_for_function(
        'text => document.querySelector(".count").textContent.includes(text)',
        arg=f'of {len(rows)} objects shown',
    )
    assert chosen_expert(page) == expert


def test_what_one_decision_is_for(open_report, soft, tmp_path):
    run = type(soft)(json.loads(json.dumps(soft.experts)), soft.outcomes)
    images = run.experts['run']['num_images']
    run.experts['layers']['bbox_head.reg_moe']['num_decisions'] = 3 * images + 1  # of RoIs, say
    page = open_report(make_report(tmp_path, run, budget=500_000))
    for layer, text in (
        (BACKBONE, f'One decision per image, {images} in all'),
        (LAYER, f'One decision per image and pyramid level, {5 * images} in all'),
        ('bbox_head.reg_moe', f'One decision per item, {3 * images + 1} in all'),
    ):
        page.locator('select.layer').select_option(layer)
        facts = page.locator('.layer-facts', has_text=text)
        facts.wait_for()
        assert facts.count() == 1


def test_experts_that_are_hardly_chosen(open_report, soft, tmp_path):
    run = type(soft)(json.loads(json.dumps(soft.experts)), soft.outcomes)
    layer = run.experts['layers'][LAYER]
    layer['dead_experts'], layer['load'][0], layer['load'][2] = [0, 2], 0, 0.001
    page = open_report(make_report(tmp_path, run, budget=500_000))
    page.locator('select.layer').select_option(LAYER)
    page.locator('.layer-facts', has_text='Never or hardly ever chosen: expert 0, 2.').wait_for()
    notes = page.locator('.expert').evaluate_all('e => e.map(x => x.getAttribute("aria-label"))')
    assert notes[0].endswith(', never chosen')
    assert notes[2].endswith(', hardly ever chosen')
    assert not any('chosen' in note for note in (notes[1], notes[3]))


def test_printing_after_a_choice_of_layer(open_report, single_report):
    """What is drawn late is of a layer that has it, and all that the new one has is drawn."""
    page = open_report(single_report)
    page.locator('select.layer').select_option(LAYER)
    page.locator('.layer-facts', has_text='pyramid level').wait_for()
    page.evaluate('dispatchEvent(new Event("beforeprint"))')
    drawn = page.locator('[data-chart=heat]:visible .chart').evaluate_all(
        'c => c.map(x => !!x.data)'
    )
    assert drawn
    assert all(drawn)


def test_a_layer_without_images_shows_its_statistics(open_report, single_report):
    page = open_report(single_report)
    page.locator('select.layer').select_option(BACKBONE)
    page.get_by_text('do not belong to single objects').wait_for()
    assert shown_rows(page) == []
    assert not page.locator('.histograms').is_visible()
    np.testing.assert_allclose(sum(chart_values(page, 'load')), 1, atol=1e-6)


FILTERS = {
    'small': dict(sizes=(0,)),
    'medium and large': dict(sizes=(1, 2)),
    'correct': dict(kinds=(CORRECT,)),
    'wrong': dict(kinds=(CLASSIFICATION, LOCALISATION)),
    'missed': dict(kinds=(MISSED,)),
    'class': dict(labels=[3]),
    'superclass': dict(labels=[0, 1]),
    'all of them': dict(sizes=(0, 1), kinds=(CORRECT, MISSED), labels=[2, 3]),
    'detections': dict(detections=1),
    'background': dict(detections=1, kinds=(BACKGROUND,)),
    'a class of detections': dict(detections=1, sizes=(0, 2), labels=[3]),
}


def set_filters(page, sizes=(0, 1, 2), kinds=range(7), labels=None, detections=0):
    page.get_by_role('button', name='Reset', exact=True).click()
    page.locator('input[name=population]').nth(detections).check()
    for name, kept, number in (('size', sizes, 3), ('kind', kinds, 7)):
        for value in range(number):
            if value not in kept:
                box = page.locator(f'input[name={name}][value="{value}"]')
                if box.is_visible():
                    box.uncheck()
    options = {None: '', (3,): f'c:{MARKUP}', (0, 1): 's:animals <i>', (2, 3): 's:things'}
    page.locator('#class-filter').select_option(options[labels and tuple(labels)])


def test_each_filter_shows_what_numpy_finds(open_report, soft, single_report):
    page = open_report(single_report)
    weights = np.rint(np.nan_to_num(soft.outcomes.weights[LAYER]) * 254)
    choose_expert(page, 3)
    for name, chosen in FILTERS.items():
        set_filters(page, **chosen)
        rows = expected_rows(soft, LAYER, 3, **chosen)
        shown = shown_rows(page)
        assert counts(page) == (len(shown), len(rows)), name
        assert set(shown) <= set(rows.tolist()), name
        assert len(rows), name
        # Weights of half octaves; the page chooses where the first one begins.
        sizes = chart_values(page, 'size')
        log = np.floor(2 * np.log2(soft.outcomes.size)).astype(int)
        own = np.bincount(log[rows] - log.min(), weights[rows, 3], len(sizes))
        np.testing.assert_allclose(sizes, own / own.sum(), atol=1e-6)
    set_filters(page)
    assert counts(page)[1] == len(expected_rows(soft, LAYER, 3))


def test_nothing_left_says_so_and_offers_to_reset(open_report, soft, single_report):
    page = open_report(single_report)
    before = counts(page)
    for box in page.locator('[data-kind]:not([hidden]) input').all():
        box.uncheck()
    assert counts(page) == (0, 0)
    assert page.get_by_text('matches these filters').is_visible()
    assert page.locator('[data-chart=class]').inner_text().endswith('Nothing to count.')
    page.get_by_role('button', name='Reset the filters').click()
    page.locator('.tile').first.wait_for()
    assert counts(page) == before
    assert len(chart_values(page, 'level')) == 5


def test_more_crops_on_request(open_report, soft, double_report):
    page = open_report(double_report)
    first = counts(page)
    assert first[0] == 24
    page.locator('.run').first.get_by_role('button', name='Show more').click()
    shown, matching = counts(page)
    assert 24 < shown == len(shown_rows(page)) <= min(48, matching)
    assert page.evaluate('document.activeElement.dataset.row') == str(shown_rows(page)[24])


def test_one_population_and_one_class_on_a_page(open_report, soft, single_report):
    """Without filters the bars are the columns of the heat maps, of objects and of detections."""
    page = open_report(single_report)
    expert = chosen_expert(page)
    for number, source in enumerate(('objects', 'detections')):
        page.locator('input[name=population]').nth(number).check()
        tables = soft.experts['layers'][LAYER]['associations'][source]
        for attribute, axis in (('class', 'x'), ('level', 'y')):
            expected = np.array(tables[attribute]['bin_given_expert'])[:, expert]
            bars = chart_values(page, attribute, axis=axis)
            np.testing.assert_allclose(bars, expected, atol=0.005)
        assert page.locator('.population').inner_text().startswith(f'every {source[:-1]}')
        assert page.locator('select.source').input_value() == source
        assert source in page.locator('[data-chart=class] .hint').first.inner_text()
        titles = ('Classes (true)', 'Classes (predicted)')
        assert page.locator('.class-title').inner_text() == titles[number]
        label = ('True class', 'Predicted class')[number]
        assert page.get_by_role('combobox', name=label).count() == 1
        listed = set(page.locator('.associations td.text').all_inner_texts())
        assert f'every {source[:-1]}' in {text.strip() for text in listed}


def test_sorting(open_report, soft, double_report):
    page = open_report(double_report)
    run, outcomes = page.locator('.run').first, soft.outcomes
    expert = chosen_expert(page)
    rows = expected_rows(soft, LAYER, expert)
    for by, column in (('score', outcomes.score), ('size', outcomes.size), ('loss', outcomes.loss)):
        run.locator('select.sort').select_option(by)
        highest = np.nan_to_num(column[shown_rows(page)], nan=-1)
        assert (np.diff(highest) <= 1 / 250).all()
        assert highest[0] == pytest.approx(np.nanmax(column[rows]), abs=1 / 250)
        run.locator('.turn').click()
        lowest = column[shown_rows(page)]
        assert (np.diff(lowest[~np.isnan(lowest)]) >= -1 / 250).all()
        assert lowest[0] == pytest.approx(np.nanmin(column[rows]), abs=1 / 250)
    run.locator('select.sort').select_option('loss')
    assert '1 where none does' in run.locator('.wall-hint').inner_text()
    assert run.locator('.numbers').first.inner_text() == 'loss 1.00'


def test_random_sample(open_report, soft, double_report):
    """That of NumPy: all images in a random order, one random row of each."""
    page = open_report(double_report)
    run, image = page.locator('.run').first, soft.outcomes.image
    run.locator('select.sort').select_option('random')
    for seed, population in ((0, 0), (0, 1), (7, 0)):
        page.locator('input[name=population]').nth(population).check()
        run.locator('.seed').fill(str(seed))
        run.locator('.seed').press('Enter')
        keys = random_keys(image, seed)
        rows = expected_rows(soft, LAYER, chosen_expert(page), detections=population)
        rows = rows[np.argsort(keys[rows], kind='stable')]
        _, first = np.unique(image[rows], return_index=True)
        sample = rows[np.sort(first)].tolist()
        shown = shown_rows(page)
        assert [row for row in sample if row in set(shown)] == shown
        if seed == 0:
            assert shown[:SAMPLE] == sample[:SAMPLE]
            assert 'A random sample' in run.locator('.wall-hint').inner_text()
    run.get_by_role('button', name='Another sample').click()
    assert run.locator('.seed').input_value() == '8'
    assert shown_rows(page) != shown


def test_search_and_least_weight(open_report, soft, single_report):
    page = open_report(single_report)
    expert, outcomes = chosen_expert(page), soft.outcomes
    rows = expected_rows(soft, LAYER, expert)
    page.get_by_label('Search').fill('IMG_01')
    assert counts(page)[1] == np.isin(outcomes.image[rows], range(10, 20)).sum() > 0
    page.get_by_label('Search').fill('dog')
    assert counts(page)[1] == (outcomes.true_label[rows] == 1).sum() > 0
    page.get_by_label('Search').fill('')
    page.locator('.least').fill('0.6')
    page.locator('.least').press('Enter')
    steps = np.rint(outcomes.weights[LAYER][rows, expert] * 254)
    assert counts(page)[1] == (steps >= 0.6 * 254).sum() > 0


def test_selection_as_csv(open_report, soft, single_report):
    page = open_report(single_report)
    page.locator('#class-filter').select_option(f'c:{MARKUP}')
    with page.expect_download() as download:
        page.get_by_role('button', name='CSV of').click()
    assert download.value.suggested_filename.endswith(f'_expert{chosen_expert(page)}_objects.csv')
    with open(download.value.path(), newline='', encoding='utf-8') as file:
        table = list(csv.DictReader(file))
    expert, outcomes = chosen_expert(page), soft.outcomes
    rows = expected_rows(soft, LAYER, expert, labels=[3])
    rows = rows[np.argsort(random_keys(outcomes.image)[rows], kind='stable')]
    steps = np.rint(outcomes.weights[LAYER][:, expert] * 254)
    rows = rows[np.argsort(-steps[rows], kind='stable')]
    assert [int(line['image']) for line in table] == outcomes.image[rows].tolist()
    assert [line['result'] for line in table] == [KINDS[k] for k in outcomes.kind[rows]]
    assert {line['true_class'] for line in table} == {MARKUP}
    assert table[0]['file'] == f'img_{outcomes.image[rows[0]]:03d}.jpg'
    assert 0 in outcomes.label[rows]
    for line, row in zip(table, rows, strict=True):
        label = outcomes.label[row]
        # A spreadsheet would compute the first.
        assert line['predicted_class'] == ('' if label < 0 else "'" * (label == 0) + CLASSES[label])
        assert float(line['weight']) == pytest.approx(steps[row] / 254, rel=0.01)
        assert float(line['loss']) == pytest.approx(outcomes.loss[row], abs=0.001)
        assert [float(line[c]) for c in ('x1', 'y1', 'x2', 'y2')] == pytest.approx(
            outcomes.box[row], abs=0.5
        )


def test_the_address_restores_the_view(open_report, double_report):
    page = open_report(double_report)
    page.locator('input[name=population]').nth(1).check()
    page.locator('input[name=size][value="1"]').uncheck()
    page.locator('input[name=kind][value="3"]').uncheck()
    page.get_by_label('Search').fill('img')
    choose_expert(page, 7, run=1)
    second = page.locator('.run').nth(1)
    second.locator('select.sort').select_option('loss')
    second.locator('.turn').click()
    second.locator('.least').fill('0.3')
    second.locator('.least').press('Enter')
    page.locator('.run').first.locator('select.layer').select_option('bbox_head.reg_moe')
    page.wait_for_function('() => location.hash.includes("reg_moe")')
    second.locator('.tile').nth(2).click()
    row = shown_rows(page, 1)[2]
    title = page.locator('#viewer-title').inner_text()
    address = page.evaluate('location.hash')
    state = [(counts(page, i), shown_rows(page, i), chosen_expert(page, i)) for i in range(2)]

    again = open_report(double_report, hash=address)
    assert again.locator('#viewer-title').inner_text() == title
    assert again.locator('.entry').first.get_attribute('data-row') == str(row)
    again.keyboard.press('Escape')
    wait_for_focus(again, row)
    assert state == [
        (counts(again, i), shown_rows(again, i), chosen_expert(again, i)) for i in range(2)
    ]
    assert again.locator('.run').first.locator('select.layer').input_value() == 'bbox_head.reg_moe'
    assert again.locator('input[name=size]:checked').count() == 2
    # An address from elsewhere is no reason to fail.
    for wrong in ('#run0=nothing~99~up~x&class=c%3Anone&open=7~7', '#filter-box', '#count=what'):
        assert counts(open_report(double_report, hash=wrong))[0] > 0


# The whole image -----------------------------------------------------------------------------


def test_a_click_opens_the_image_with_all_its_boxes(open_report, soft, single_report):
    page = open_report(single_report)
    outcomes = soft.outcomes
    for index in (0, 5):
        row = shown_rows(page)[index]
        page.locator('.tile').nth(index).click()
        dialog = page.get_by_role('dialog')
        dialog.wait_for()
        image = int(outcomes.image[row])
        rows = np.flatnonzero(outcomes.image == image)
        name = f'img_{image:03d}.jpg'
        assert dialog.get_by_role('heading', name=name, exact=True).is_visible()
        link = dialog.get_by_role('link', name='Open the file')
        assert link.get_attribute('href') == f'my%20data/val%20%231/{name}'
        boxes = dialog.locator('.box')
        assert boxes.count() == dialog.locator('.entry').count() == len(rows)
        assert dialog.locator('.box.object').count() == (~outcomes.is_detection[rows]).sum()
        # Where the boxes lie on the image.
        frame = dialog.locator('.stage img').bounding_box()
        scale = frame['width'] / soft.width
        assert frame['height'] == pytest.approx(soft.height * scale, abs=1)
        for row in rows:
            box = dialog.locator(f'.box[data-row="{row}"]')
            place, (x1, y1, x2, y2) = box.bounding_box(), outcomes.box[row]
            x2, y2 = min(x2, soft.width), min(y2, soft.height)
            assert place['x'] - frame['x'] == pytest.approx(x1 * scale, abs=3)
            assert place['y'] - frame['y'] == pytest.approx(y1 * scale, abs=3)
            assert place['width'] == pytest.approx((x2 - x1) * scale, abs=4)
            assert place['height'] == pytest.approx((y2 - y1) * scale, abs=4)
            weights = outcomes.weights[LAYER][row]
            tag = dialog.locator(f'.tag[data-row="{row}"]').text_content()
            text = dialog.locator(f'.entry[data-row="{row}"]').inner_text()
            # The true class stands beside what was predicted.
            assert CLASSES[outcomes.counted_label[row]] in text
            if outcomes.kind[row] not in (MISSED, BACKGROUND):
                assert f'IoU {outcomes.iou[row]:.2f}'[:-1] in text
                true, said = outcomes.true_label[row], outcomes.label[row]
                assert outcomes.kind[row] != CLASSIFICATION or (
                    CLASSES[true] in text and CLASSES[said] in text
                )
            if np.isnan(weights).any():
                assert tag == '–'
                continue
            assert tag == str(weights.argmax())
            said = dict(re.findall(r'expert (\d+): ([\d.]+)', text))
            assert {int(e) for e in said} == set(np.flatnonzero(np.rint(weights * 254)).tolist())
            for expert, weight in said.items():
                assert float(weight) == pytest.approx(weights[int(expert)], abs=0.5 / 254 + 0.006)
        page.keyboard.press('Escape')
        dialog.wait_for(state='hidden')
        wait_for_focus(page, shown_rows(page)[index])


def test_an_object_and_its_detection_are_marked_together(open_report, soft, single_report):
    page = open_report(single_report)
    outcomes = soft.outcomes
    row = next(row for row in shown_rows(page) if outcomes.kind[row] == CLASSIFICATION)
    page.locator(f'.tile[data-row="{row}"]').click()
    chosen = page.locator('.box.chosen').evaluate_all('all => all.map(b => Number(b.dataset.row))')
    assert set(chosen) == {row, row + outcomes.partner[row]}
    page.get_by_role('checkbox', name='Ground truth').uncheck()
    assert not page.locator('.box.object').first.is_visible()
    assert page.locator('.box.detection').first.is_visible()


@pytest.mark.parametrize('width', [1280, 400])
def test_tags_do_not_touch(open_report, tmp_path, width):
    """Not even those of six boxes at one place."""
    run = detection_run(num_images=1, objects_per_image=8, layers=((LAYER, 12),), seed=5)
    run.outcomes.box[:] = [100, 80, 160, 140]
    page = open_report(make_report(tmp_path, run), width=width)
    page.locator('.tile').first.click()
    tags = [tag.bounding_box() for tag in page.locator('.tag:visible').all()]
    assert len(tags) >= 6
    for a, b in itertools.combinations(tags, 2):
        apart_x = a['x'] + a['width'] <= b['x'] or b['x'] + b['width'] <= a['x']
        assert apart_x or a['y'] + a['height'] <= b['y'] or b['y'] + b['height'] <= a['y']


def test_names_with_markup_are_text(open_report, single_report):
    html = single_report.read_text()
    assert MARKUP not in html
    assert '<b>bold' not in html
    page = open_report(single_report)
    assert page.evaluate('window.broken') is None
    names = page.locator('#class-filter option').all_inner_texts()
    assert set(CLASSES) | set(SUPERCLASSES) <= set(names)
    chart_values(page, 'class')
    labels = page.locator('[data-chart=class] .ytick text').all_text_contents()
    assert labels[1:3] == list(CLASSES[1:3])
    assert labels[3].startswith('</script><scr')


@pytest.mark.parametrize('scheme', ['javascript', 'JavaScript', ' javascript', 'https'])
def test_files_named_like_scripts_are_no_scripts(open_report, single_report, tmp_path, scheme):
    name = f'{scheme}://%0awindow.broken=1'
    path = tmp_path / 'report.html'
    path.write_text(re.sub(r'img_\d{3}\.jpg', name, single_report.read_text()))
    page = open_report(path)
    page.locator('.tile').first.click()
    address = page.get_by_role('link', name='Open the file').evaluate('link => link.href')
    assert address.startswith('https:' if scheme == 'https' else 'file:')


def test_tables_show_the_associations_and_interventions(open_report, soft, single_report):
    page = open_report(single_report)
    level = soft.experts['layers'][LAYER]['associations']['objects']['level']
    row = page.locator('.associations tr', has_text='pyramid level').first
    assert f'{level["mi"]:.3f} [{0.9 * level["mi"]:.3f}, ' in row.inner_text()
    assert '≤ 0.001' in row.inner_text()
    assert '0.012 [−0.010, 0.030], p 0.400' in row.inner_text()
    assert row.inner_text().endswith('through the level')
    table = page.locator('.interventions table')
    mine = [i for i in soft.experts['interventions'] if i['layer'] in (LAYER, 'all')]
    assert table.locator('tbody tr').count() == len(mine) + 1
    change = mine[0]['metrics']['AP'] - soft.experts['metrics']['AP']
    text = table.locator('tr', has_text='only expert 0').inner_text()
    assert f'−{abs(change):.3f}' in text


def test_heat_maps_show_shares_on_one_scale(open_report, soft, tmp_path):
    """Numbers: conditional shares. Colours: how much more than independence, faded where chance."""
    experts = json.loads(json.dumps(soft.experts))
    tables = experts['layers'][LAYER]['associations']['objects']
    marked = np.random.default_rng(0).random((5, 4)) < 0.5
    tables['level']['cell_p'] = np.where(marked, 0.01, 0.3).tolist()
    run = type(soft)(experts, soft.outcomes)
    page = open_report(make_report(tmp_path, run, budget=500_000))
    maps = {}
    for attribute in ('level', 'class', 'position'):
        card = f'[data-chart=heat][data-attribute={attribute}]'
        page.locator(card).scroll_into_view_if_needed()
        page.wait_for_function(f'() => document.querySelector("{card} .chart").data')
        maps[attribute] = page.evaluate(
            f'(({{z, text, zmin, zmax}}) => [z, text, zmin, zmax])(document.querySelector("{card} .chart").data[0])'  # noqa: E501
        )
    z, text, *limits = maps['level']
    counts_ = np.array(tables['level']['counts'])
    expected = counts_.sum(1, keepdims=True) * counts_.sum(0) / counts_.sum()
    with np.errstate(divide='ignore', invalid='ignore'):
        lift = np.log2(counts_ / expected).clip(-2, 2)
    seen = counts_.sum(1) > 0
    np.testing.assert_allclose(z, np.where(marked, lift, 0)[seen], atol=1e-4)
    shares = np.array(tables['level']['bin_given_expert'])[seen]
    np.testing.assert_allclose(
        [[float(cell.split()[0]) / 100 for cell in row] for row in text], shares, atol=0.006
    )
    assert all(m[2:] == limits == [-2, 2] for m in maps.values())
    assert not np.any(maps['class'][0])  # p = 0.62 of the whole table
    page.locator('select.direction').select_option('bin')
    card = '[data-chart=heat][data-attribute=level]'
    page.locator(card).scroll_into_view_if_needed()
    read = f'document.querySelector("{card} .chart").data?.[0].text[0].map(parseFloat)'
    page.wait_for_function(f'() => Math.abs({read}.reduce((a, b) => a + b) - 100) < 2.1')


# Keys ----------------------------------------------------------------------------------------


def tab_until(page, test, limit=60):
    """Press Tab until a JavaScript test of the focused element holds."""
    for _ in range(limit):
        page.keyboard.press('Tab')
        if page.evaluate(f'(e => {test})(document.activeElement)'):
            return
    raise AssertionError(f'Tab does not reach {test}')


def test_everything_can_be_reached_by_keys(open_report, soft, single_report):
    page = open_report(single_report)
    tab_until(page, 'e.name === "population"')
    tab_until(page, 'e.name === "size" && e.value === "0"')
    page.keyboard.press('Space')
    tab_until(page, 'e.id === "class-filter"')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    assert page.locator('#class-filter').input_value() == 's:animals <i>'
    tab_until(page, 'e.classList.contains("expert")')
    page.keyboard.press('Home')
    page.keyboard.press('ArrowRight')
    assert chosen_expert(page) == 1
    rows = expected_rows(soft, LAYER, 1, sizes=(1, 2), labels=[0, 1])
    assert counts(page)[1] == len(rows) > 0
    # Focus can be seen.
    style = page.evaluate('getComputedStyle(document.activeElement).outlineStyle')
    assert style == 'solid'

    tab_until(page, 'e.classList.contains("tile")')
    shown = shown_rows(page)
    focused = 'document.activeElement.dataset.row'
    assert page.evaluate(focused) == str(shown[0])
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowRight')
    assert page.evaluate(focused) == str(shown[2])
    page.keyboard.press('End')
    assert page.evaluate(focused) == str(shown[-1])
    page.keyboard.press('Home')
    page.keyboard.press('ArrowDown')
    below = int(page.evaluate(focused))
    place = page.locator(f'.tile[data-row="{below}"]').bounding_box()
    first = page.locator('.tile').first.bounding_box()
    assert place['x'] == pytest.approx(first['x'], abs=1)
    assert place['y'] > first['y']
    page.keyboard.press('ArrowUp')
    assert page.evaluate(focused) == str(shown[0])

    page.keyboard.press('Enter')
    page.get_by_role('dialog').wait_for()
    title = page.locator('#viewer-title')
    assert title.inner_text() == f'img_{soft.outcomes.image[shown[0]]:03d}.jpg'
    page.keyboard.press('ArrowRight')
    assert title.inner_text() == f'img_{soft.outcomes.image[shown[1]]:03d}.jpg'
    tab_until(page, 'e.classList.contains("entry")')
    assert page.locator('.box.pointed').count() == 1
    page.keyboard.press('Escape')
    page.get_by_role('dialog').wait_for(state='hidden')
    wait_for_focus(page, shown[1])


def test_controls_have_roles_and_names(open_report, single_report):
    page = open_report(single_report)
    assert page.get_by_role('form', name='Filters').count() == 1
    assert page.get_by_role('combobox', name='Layer').count() == 1
    group = page.get_by_role('radiogroup', name='Expert')
    assert group.get_by_role('radio').count() == 4
    assert group.get_by_role('radio', checked=True).count() == 1
    assert page.get_by_role('checkbox', name='Missed').is_checked()
    row = shown_rows(page)[0]
    tile = page.get_by_role('button', name=re.compile(r'weight .*, image \d+'))
    assert tile.first.get_attribute('data-row') == str(row)
    assert page.locator('[role=img][aria-label*="weight"]').count() >= 1


# Widths, two runs, classifiers ---------------------------------------------------------------


def assert_no_horizontal_scroll(page):
    page.evaluate("""async () => {
        for (let y = 0; y < document.body.scrollHeight; y += 300) {
            scrollTo(0, y);
            await new Promise(resolve => setTimeout(resolve, 30));
        }
    }""")
    for element in ('document.documentElement', 'document.body'):
        assert page.evaluate(f'{element}.scrollWidth <= innerWidth'), element


@pytest.mark.parametrize('report', ['single_report', 'double_report', 'classifier_report'])
def test_a_narrow_screen_needs_no_horizontal_scrolling(open_report, request, report):
    page = open_report(request.getfixturevalue(report), width=400, height=800)
    assert_no_horizontal_scroll(page)
    page.locator('.tile').first.click()
    dialog = page.get_by_role('dialog')
    dialog.wait_for()
    assert dialog.evaluate('d => d.scrollWidth <= d.clientWidth')
    frame = dialog.locator('.stage img').bounding_box()
    assert frame['x'] >= 0
    assert frame['x'] + frame['width'] <= 400


def test_two_runs_stand_side_by_side_with_shared_filters(open_report, soft, hard, double_report):
    page = open_report(double_report)
    sections = page.locator('.run')
    assert sections.count() == 2
    for i, run in enumerate((soft, hard)):
        assert run.experts['run']['config'] in sections.nth(i).locator('h2').inner_text()
    left, right = (sections.nth(i).bounding_box() for i in range(2))
    assert left['x'] + left['width'] <= right['x']
    assert abs(left['y'] - right['y']) < 1
    # Experts of their own ...
    choose_expert(page, 2, run=0)
    choose_expert(page, 11, run=1)
    assert (chosen_expert(page, 0), chosen_expert(page, 1)) == (2, 11)
    # ... and common filters.
    page.locator('input[name=size][value="2"]').uncheck()
    for value in (CLASSIFICATION, LOCALISATION):
        page.locator(f'input[name=kind][value="{value}"]').uncheck()
    for i, (run, expert) in enumerate(((soft, 2), (hard, 11))):
        rows = expected_rows(run, LAYER, expert, sizes=(0, 1), kinds=(CORRECT, MISSED))
        assert counts(page, i)[1] == len(rows)
    page.locator('#class-filter').select_option('c:dog')  # which only the second run has
    assert counts(page, 0) == (0, 0)
    rows = expected_rows(hard, LAYER, 11, sizes=(0, 1), kinds=(CORRECT, MISSED), labels=[1])
    assert counts(page, 1)[1] == len(rows)


def test_two_runs_are_stacked_on_a_narrow_screen(open_report, double_report):
    page = open_report(double_report, width=400, height=800)
    above, below = (page.locator('.run').nth(i).bounding_box() for i in range(2))
    assert above['y'] + above['height'] <= below['y']
    assert above['x'] == below['x']


def test_a_classifier_has_no_sizes_and_no_levels(open_report, classifier, classifier_report):
    page = open_report(classifier_report)
    assert page.locator('input[name=size]').count() == 0
    for chart in ('size', 'level'):
        assert not page.locator(f'[data-chart={chart}]').is_visible()
    expert, layer = chosen_expert(page), 'backbone.layer3'
    assert counts(page)[1] == len(expected_rows(classifier, layer, expert))
    page.locator('input[name=kind][value="0"]').uncheck()
    rows = expected_rows(classifier, layer, expert, kinds=(CLASSIFICATION,))
    assert counts(page)[1] == len(rows) > 0
    # Of 100 classes the chart names twelve and adds up the others in words.
    values = chart_values(page, 'class', axis='x')
    assert len(values) == 12
    note = page.locator('[data-chart=class] .note').inner_text()
    assert note.startswith('88 other classes: ')
    assert int(re.search(r'(\d+) % of the weight', note).group(1)) == round(100 * (1 - sum(values)))
    page.locator('.tile').first.click()
    page.get_by_role('dialog').wait_for()
    assert page.locator('.box').count() == 0
    assert page.locator('.entry').count() == 1


def test_one_layer_of_64_experts(open_report, tmp_path):
    run = detection_run(layers=(('router', 64),), num_images=10)
    run.experts['interventions'] = []
    run.experts['history'] = None
    run.experts['layers']['router']['associations'] = {}
    page = open_report(make_report(tmp_path, run), width=400, height=800)
    assert page.locator('.expert').count() == 64
    for expert in (0, 63):
        choose_expert(page, expert)
        assert counts(page)[1] == len(expected_rows(run, 'router', expert))
    assert not page.locator('.interventions').is_visible()
    assert not page.locator('.associations').is_visible()
    assert_no_horizontal_scroll(page)


def test_very_many_experts_with_small_coefficients(open_report, tmp_path):
    """Those with the most weight, under their own numbers; all that the page says is of them."""
    run = classification_run(num_classes=10, experts=100, top_k=100)
    layer, weights = (
        run.experts['layers']['backbone.layer3'],
        run.outcomes.weights['backbone.layer3'],
    )
    shown = layer['coactivation_experts']
    layer |= {'kind': 'factorised', 'granularity': 'token'}
    layer['polysemanticity'] = {
        'num_zeroed': 100, 'num_mattering': 1, 'mean': 0.5, 'experts': list(range(100)),
        'values': [0.5 if e == shown[40] else None for e in range(100)],
        'classes': ['class 3' if e == shown[40] else None for e in range(100)],
        'drops': [0.25 if e == shown[40] else 0 for e in range(100)],
        'largest': {'expert': shown[40], 'class': 'class 3', 'drop': 0.25, 'p_adjusted': 0.001},
    }  # fmt: skip
    metrics = run.experts['metrics']
    run.experts['interventions'] = [
        {'layer': 'backbone.layer3', 'kind': 'zeroed', 'expert': e,
         'metrics': {**metrics, 'accuracy': 0.6 - 0.001 * e}} for e in range(100)
    ]  # fmt: skip
    run.experts['history'] = None
    page = open_report(make_report(tmp_path, run))
    assert page.locator('.expert').count() == 64
    facts = page.locator('.layer-facts').inner_text()
    assert '100 experts, each with a coefficient per decision' in facts
    assert '64 of 100 experts, those with the most weight' in facts
    place = 40
    choose_expert(page, place)
    assert page.locator('.wall-title').inner_text() == f'What expert {shown[place]} works on'
    column = weights[:, shown[place]]
    assert column[shown_rows(page)[0]] == pytest.approx(column.max(), rel=1e-3)
    ranked = column[shown_rows(page)]
    assert (np.diff(ranked) <= 1e-4).all()
    text = page.locator('.count').inner_text()
    assert 'zeroed, class class 3 loses 25.0 points; polysemanticity 0.50' in text
    first = page.locator('.tile .numbers').first.inner_text()
    assert float(first.split()[1]) == pytest.approx(column.max(), rel=0.06)
    assert chart_values(page, 'load', axis='x') == [str(e) for e in shown]
    assert chart_values(page, 'coactivation', axis='x') == [str(e) for e in shown]
    hint = page.locator('.zeroed-hint').inner_text()
    assert 'Of the 100 experts that were zeroed, the 16 that cost most' in hint
    rows = page.locator('.interventions tbody th').all_inner_texts()
    assert rows == ['unchanged', *(f'expert {e} zeroed' for e in range(99, 83, -1))]
    # Shares are those of all 100.
    table = np.array(layer['associations']['objects']['class']['counts'])
    page.locator('select.direction').select_option('bin')
    card = '[data-chart=heat][data-attribute=class]'
    page.locator(card).scroll_into_view_if_needed()
    read = f'document.querySelector("{card} .chart").data?.[0]'
    page.wait_for_function(f'() => {read}?.text[0].map(parseFloat).reduce((a, b) => a + b) < 99')
    found = np.array(page.evaluate(f'{read}.customdata')), page.evaluate(f'{read}.text')
    shares = (table / table.sum(1, keepdims=True))[:, shown]
    for name, line in zip(*found, strict=True):
        of_class = shares[int(str(np.ravel(name)[0]).split()[-1])]
        got = [float(cell.split()[0]) / 100 for cell in line]
        np.testing.assert_allclose(got, of_class, atol=0.0051)  # whole percents from 1 on


def test_no_class_is_named_that_too_few_images_are_behind(open_report, tmp_path):
    run = classification_run(num_classes=10, experts=4, top_k=2)
    run.experts['layers']['backbone.layer3']['polysemanticity'] = {
        'num_zeroed': 4, 'num_mattering': 4, 'mean': 0.5, 'experts': [0, 1, 2, 3],
        'values': [0.5] * 4, 'classes': ['class 3'] * 4, 'drops': [1.0] * 4, 'largest': None,
    }  # fmt: skip
    page = open_report(make_report(tmp_path, run))
    text = page.locator('.count').inner_text()
    assert 'polysemanticity 0.50' in text
    assert 'loses' not in text


def test_numbers_of_images_are_those_in_the_data_set(open_report, tmp_path):
    """Of a part that was drawn, in the search and the file as on the tiles."""
    run = classification_run(num_classes=10, experts=4, top_k=2)
    numbers = 1000 + 7 * np.arange(run.experts['run']['num_images'])
    run.experts['run']['images'] = numbers.tolist()
    page = open_report(make_report(tmp_path, run))
    expert = chosen_expert(page)
    rows = expected_rows(run, 'backbone.layer3', expert)
    with page.expect_download() as download:
        page.get_by_role('button', name='CSV of').click()
    with open(download.value.path(), newline='', encoding='utf-8') as file:
        found = [int(line['image']) for line in csv.DictReader(file)]
    assert sorted(found) == numbers[run.outcomes.image[rows]].tolist()
    page.get_by_label('Search').fill(str(found[0]))
    assert counts(page) == (1, 1)


def test_pictures_of_two_runs_begin_on_the_first_screen(open_report, double_report):
    page = open_report(double_report, width=1280, height=800)
    assert page.locator('.tile').first.bounding_box()['y'] < 800


@pytest.mark.parametrize(('width', 'screens'), [(1280, 1), (400, 2)])
def test_pictures_begin_early_below_three_lines_of_verdict(
    open_report, soft, single_report, width, screens
):
    page = open_report(single_report, width=width, height=800)
    tile = page.locator('.tile').first.bounding_box()
    assert tile['y'] + tile['height'] < screens * 800
    page.locator('select.layer').select_option(BACKBONE)
    page.wait_for_function('() => location.hash.includes("backbone")')
    entry, of_all = soft.experts['verdict']
    assert page.locator('.verdict-title').inner_text() == f'Verdict: {entry["name"]}'
    assert page.locator('.verdict-lines li').all_inner_texts() == entry['lines']
    assert not page.get_by_text(entry['details'][0]).is_visible()
    page.locator('.verdict summary').click()
    for sentence in (*entry['details'], *of_all['details']):
        assert page.get_by_text(sentence).is_visible()
    assert page.locator('select.layer option').all_inner_texts()[1] == 'Classification head'
    assert page.locator('.layer-path').inner_text() == BACKBONE


def test_forced_colours_show_what_is_chosen(open_report, single_report):
    page = open_report(single_report, forced_colors='active')
    style = 'e => getComputedStyle(e).outlineStyle'
    assert page.locator('.expert[aria-checked=true]').evaluate(style) == 'solid'
    assert page.locator('.expert[aria-checked=false]').first.evaluate(style) == 'none'
    colours = page.locator('.expert .badge').evaluate_all(
        'all => all.map(e => getComputedStyle(e).backgroundColor)'
    )
    assert len(set(colours)) == len(colours) == 4


def test_regions_of_two_runs_have_names_of_their_own(open_report, double_report):
    page = open_report(double_report)
    names = page.locator('[role=region]').evaluate_all('all => all.map(e => e.ariaLabel)')
    assert len(set(names)) == len(names) == 4


def test_dark_screens(open_report, single_report):
    page = open_report(single_report, color_scheme='dark')
    background = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert all(int(channel) < 60 for channel in re.findall(r'\d+', background))


def test_all_charts_follow_a_change_to_dark(open_report, single_report):
    page = open_report(single_report, color_scheme='light')
    page.locator('select.layer').select_option(BACKBONE)  # which has a history
    for name in ('history', 'load', 'coactivation'):
        chart_values(page, name)
    page.emulate_media(color_scheme='dark')
    ink = page.evaluate(
        'getComputedStyle(document.documentElement).getPropertyValue("--ink").trim()'
    )
    for name in ('history', 'load', 'coactivation'):
        chart = f'[data-chart={name}] .chart'
        page.locator(chart).scroll_into_view_if_needed()
        page.wait_for_function(
            f'ink => document.querySelector("{chart}").layout.font.color === ink', arg=ink
        )
        assert page.locator(chart).evaluate('c => c.layout.font.color') == ink


# Without a browser ---------------------------------------------------------------------------


def test_names_cannot_end_the_script_that_holds_them(single_report):
    html = single_report.read_text()
    data = re.search(r'<script type="application/json" id="payload-0">(.*?)</script>', html, re.S)
    assert '<' not in data.group(1)
    assert data.group(1).rstrip().endswith('}')


def test_nothing_in_the_file_is_loaded_from_elsewhere(single_report):
    html = single_report.read_text()
    before_data = html[: html.index('id="payload-0"')]
    assert not re.search(r'(src|href)="?(https?:)?//', before_data)
    assert "default-src 'none'" in before_data


@pytest.mark.parametrize('number', [0, 3])
def test_one_or_two_runs(tmp_path, number):
    with pytest.raises(ConfigError, match='one run or two'):
        write_report([{}] * number, tmp_path / 'report.html')
    assert list(tmp_path.iterdir()) == []


def test_a_detector_is_not_compared_with_a_classifier(soft, classifier, tmp_path):
    with pytest.raises(ConfigError, match='two detectors or two classifiers'):
        make_report(tmp_path, soft, classifier, budget=300_000)
    assert list(tmp_path.iterdir()) == []
