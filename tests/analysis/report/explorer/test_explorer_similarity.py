"""How alike the experts are, as the report draws it in a browser."""

import numpy as np
from explorer_runs import detection_run
from scipy.cluster.hierarchy import dendrogram, linkage

from mmdet_moe.analysis.report.explorer import build_payload, write_report

LAYER, OTHER = 'bbox_head.cls_moe', 'bbox_head.reg_moe'


def test_similarity_and_tree(browser, tmp_path):
    """The matrix as it is, and the tree as SciPy draws it; no cards where nothing is known."""
    run = detection_run(num_images=10, layers=((LAYER, 6), (OTHER, 4)))
    pairs = np.random.default_rng(0).uniform(0.1, 0.9, 15)
    cka = np.eye(6)
    cka[np.triu_indices(6, 1)] = 1 - pairs
    cka = (np.maximum(cka, cka.T)).tolist()
    tree = linkage(pairs, 'average')
    run.experts['layers'][LAYER]['similarity'] = {
        'reason': None,
        'weights': {'cosine': np.eye(6).tolist()},
        'outputs': {'cosine': np.full((6, 6), 0.25).tolist(), 'cka': cka, 'num_examples': 99},
        'linkage': tree.tolist(),
        'linkage_of': 'outputs',
        'training': None,
    }
    path = tmp_path / 'report.html'
    write_report([build_payload(run.experts, run.outcomes, run.load_image)], path)
    page = browser.new_page()
    problems = []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector('html[data-ready]')
    page.locator('select.layer').select_option(LAYER)

    def trace(name):
        page.locator(f'[data-chart={name}]').scroll_into_view_if_needed()
        page.wait_for_function(
            'name => document.querySelector(`[data-chart=${name}] .chart`).data', arg=name
        )
        return page.evaluate(
            'name => { const { x, y, z } = document.querySelector(`[data-chart=${name}] .chart`)'
            '.data[0]; return { x, y, z }; }',
            name,
        )

    assert trace('similarity')['z'] == cka
    hint = page.locator('.similarity-hint').inner_text()
    assert 'cosine of the weights 0.000, of the outputs 0.250' in hint
    assert f'linear CKA {1 - pairs.mean():.3f}' in hint
    drawn, expected = trace('tree'), dendrogram(tree, no_plot=True)
    lines = {
        tuple(np.round([drawn[axis][i : i + 4] for axis in 'xy'], 6).ravel())
        for i in range(0, 25, 5)
    }
    corners = zip(expected['icoord'], expected['dcoord'], strict=True)
    assert lines == {tuple(np.round([(np.array(x) - 5) / 10, y], 6).ravel()) for x, y in corners}
    ticks = page.locator('[data-chart=tree] .xtick text').all_text_contents()
    assert ticks == [str(leaf) for leaf in expected['leaves']]
    page.locator('select.layer').select_option(OTHER)
    for name in ('similarity', 'tree'):
        page.locator(f'[data-chart={name}]').wait_for(state='hidden')
    page.close()
    assert problems == []
