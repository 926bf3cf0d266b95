"""The choices in the report: bands from layer to layer, and pictures that wait to be opened."""

import base64
import io
import itertools

import numpy as np
import pytest
from explorer_runs import detection_run
from PIL import Image

from mmdet_moe.analysis.report.explorer import (
    build_payload,
    read_payload,
    write_payload,
    write_report,
)

LAYERS = ('backbone.layer4', 'bbox_head.cls_moe')
COUNTS = np.array([[30, 0, 10, 0], [0, 0, 0, 0], [5, 0, 0, 15]])


def picture(layer):
    content = io.BytesIO()
    Image.new('RGB', (1100, 300), 'red').save(content, 'PNG')
    source = f'data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}'
    return {'layer': layer, 'title': 'What <each> takes', 'source': source}


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    run = detection_run(backbone=True)
    step = {
        'from': LAYERS[0], 'to': LAYERS[1], 'num_units': 60, 'counts': COUNTS.tolist(),
        'mi': 0.5, 'chance': 0.25, 'p_value': 0.005,
    }  # fmt: skip
    run.experts['flows'] = [{'unit': 'image', 'layers': list(LAYERS), 'steps': [step]}]
    folder = tmp_path_factory.mktemp('choices')
    payload = build_payload(
        run.experts, run.outcomes, run.load_image, pictures=[picture(LAYERS[1])], folder=folder
    )
    write_payload(payload, folder / 'explorer.json')
    payload = read_payload(folder / 'explorer.json')
    write_report([payload], folder / 'report.html')
    return folder / 'report.html'


def open_page(browser, path, width):
    page = browser.new_page(viewport={'width': width, 'height': 900})
    page.problems = []
    page.on('pageerror', lambda error: page.problems.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector('html[data-ready]')
    page.wait_for_selector('[data-flow] .sankey-node')
    return page


@pytest.mark.parametrize('width', [1280, 400])
def test_bands_and_pictures(browser, report, width):
    page = open_page(browser, report, width)
    trace = page.evaluate("document.querySelector('[data-flow]').data[0]")
    # Experts without anything have no node; a band for each cell that is not empty.
    assert trace['node']['label'] == ['0', '2', '0', '2', '3']
    assert trace['link']['value'] == pytest.approx([30 / 60, 10 / 60, 5 / 60, 15 / 60])
    assert trace['link']['source'] == [0, 0, 1, 1]
    assert trace['link']['target'] == [2, 3, 2, 4]
    boxes = [node.bounding_box() for node in page.query_selector_all('.node-rect')]
    left, right = boxes[:2], boxes[2:]
    for column, shares in ((left, [40, 20]), (right, [35, 10, 15])):
        heights = np.array([box['height'] for box in column])
        np.testing.assert_allclose(heights / heights.sum(), np.array(shares) / 60, atol=0.02)
        for above, below in itertools.pairwise(column):
            assert above['y'] + above['height'] < below['y']
    text = page.inner_text('.flow-steps')
    assert 'Stage 4 of the backbone → Classification head: 60 images, 0.500 nats' in text
    assert 'exchanged 0.250, p = 0.005' in text
    assert not page.evaluate("document.querySelector('.choice-picture').open")
    page.click('.choice-picture summary')
    assert page.inner_text('.choice-picture summary') == 'What <each> takes'
    page.evaluate("document.querySelector('.choice-picture img').decode()")
    assert page.evaluate("document.querySelector('.choice-picture img').naturalWidth") == 1100
    box = page.query_selector('.choice-picture img').bounding_box()
    assert box['width'] / box['height'] == pytest.approx(1100 / 300, rel=0.02)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.problems == []
    page.close()


def test_nothing_of_it_without_flows_and_pictures(tmp_path):
    run = detection_run()
    payload = build_payload(run.experts, run.outcomes, run.load_image, folder=tmp_path)
    del payload['flows'], payload['pictures']  # as an older analysis wrote it
    write_report([payload], tmp_path / 'report.html')
    assert 'class="choices"' not in (tmp_path / 'report.html').read_text()
