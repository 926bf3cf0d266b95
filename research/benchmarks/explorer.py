"""How long the Expert Explorer of a large data set takes to load, and how large its file is."""

import os
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from mmdet_moe.analysis.records.contents import DecisionRecords, select
from mmdet_moe.analysis.report.explorer import build_payload, write_report
from mmdet_moe.analysis.statistics.association import Association
from mmdet_moe.analysis.statistics.bins import COCO_SIZES, SIZES, Bins, coco_size_bin, size_bin
from mmdet_moe.analysis.statistics.layer_statistics import LayerStatistics
from mmdet_moe.analysis.statistics.matching import CLASSIFICATION, CORRECT, MISSED
from mmdet_moe.analysis.statistics.outcomes import Outcomes
from mmdet_moe.errors import ConfigError
from research.benchmarks.harness import Benchmark

CLASSES, LEVELS, EXPERTS, ROWS_PER_IMAGE = 80, 5, 4, 7.2
LAYERS = ('bbox_head.cls_moe', 'bbox_head.reg_moe')
HEIGHT, WIDTH = 480, 640
LOADS = 5
_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


def run_explorer(bench: Benchmark, num_images: int) -> None:
    """One run with as many objects as COCO has, and as many detections, and two side by side.

    Random decisions on noise, which compresses worse than photographs do.

    Raises:
        ConfigError: Without Playwright or Chromium.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ConfigError('the suite explorer needs `pip install playwright`') from error
    browser_path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser_path is None:
        raise ConfigError('the suite explorer needs a Chromium on the PATH')
    payloads = [_payload(num_images, seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=['--no-sandbox', '--disable-dev-shm-usage']
        )
        for count in (1, 2):
            path = Path(folder) / f'{count}.html'
            write_report(payloads[:count], path)
            loads = [_load(browser, path) for _ in range(LOADS)]
            pictures, charts, busy = map(statistics.median, zip(*loads, strict=True))
            what = f'{num_images} images' + (', two runs' if count == 2 else '')
            each = ', '.join(f'{load[1]:.2f}' for load in loads)
            bench.note(
                f'{what}: pictures after {pictures:.2f} s, charts after {each} s; CPU time of the '
                f"page's thread {busy:.2f} s; load average {os.getloadavg()[0]:.1f}"
            )
            bench.target(f'{what}: loads in at most 2 s', charts, at_most=2, unit=' s')
            bench.target(
                f'{what}: at most 25 MB', path.stat().st_size / 1e6, at_most=25, unit=' MB'
            )
        browser.close()


def _load(browser, path: Path) -> tuple[float, float, float]:
    """Seconds until the pictures are there, and the first charts; and of CPU time for both."""
    context = browser.new_context(viewport={'width': 1280, 'height': 900}, offline=True)
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send('Performance.enable', {'timeDomain': 'threadTicks'})
    page.goto(path.as_uri())
    page.wait_for_selector('html[data-ready]', timeout=120_000)
    measured = session.send('Performance.getMetrics')['metrics']
    (busy,) = (entry['value'] for entry in measured if entry['name'] == 'TaskDuration')
    shown = page.evaluate('({ ...document.documentElement.dataset })')
    context.close()
    return float(shown['pictures']) / 1000, float(shown['ready']) / 1000, busy


def _payload(num_images: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    outcomes = _outcomes(rng, num_images)
    experts = {
        'run': {
            'config': f'run {seed}',
            'checkpoint': 'made up',
            'task': 'detection',
            'split': 'val',
            'num_images': num_images,
            'num_objects': len(outcomes) // 2,
            'num_detections': len(outcomes) // 2,
            'score_thr': 0.3,
            'classes': [f'class {i}' for i in range(CLASSES)],
            'superclasses': None,
            'num_levels': LEVELS,
        },
        'metrics': {'AP': 0.4},
        'layers': {name: _layer(select(outcomes, ~outcomes.is_detection), name) for name in LAYERS},
        'interventions': [],
        'history': None,
        'verdict': [],
    }

    def load_image(index: int) -> np.ndarray:
        noise = np.random.default_rng(index).normal(120, 12, (HEIGHT, WIDTH, 3))
        return noise.clip(0, 255).astype(np.uint8)

    return build_payload(
        experts, outcomes, load_image, path_of=lambda index: f'/data/val2017/{index:012d}.jpg'
    )


def _outcomes(rng: np.random.Generator, num_images: int) -> Outcomes:
    # In every image as many detections as objects, the first of one for the first of the other.
    objects = round(ROWS_PER_IMAGE * num_images)
    of_object = np.sort(rng.integers(0, num_images, objects))
    image, is_detection = np.tile(of_object, 2), np.arange(2 * objects) >= objects
    found = np.tile(rng.integers(0, 3, objects) > 0, 2)
    wrong = np.where(is_detection, rng.integers(CLASSIFICATION, MISSED, 2 * objects), MISSED)
    order = np.argsort(image, kind='stable')
    image, is_detection, found, wrong = (x[order] for x in (image, is_detection, found, wrong))
    rows, number = len(image), np.bincount(of_object)[image]
    size = np.exp(rng.uniform(np.log(10), np.log(300), rows)).astype(np.float32)
    corner = rng.uniform(0, [WIDTH - 310, HEIGHT - 310], (rows, 2))
    label = rng.integers(0, CLASSES, rows).astype(np.int32)
    weights = {}
    for name in LAYERS:
        drawn = rng.dirichlet(np.ones(EXPERTS), rows)
        drawn[np.arange(rows)[:, None], drawn.argsort(1)[:, :-2]] = 0  # k = 2
        weights[name] = (drawn / drawn.sum(1, keepdims=True)).astype(np.float32)
    return Outcomes(
        image=image.astype(np.int32),
        is_detection=is_detection,
        box=np.concatenate([corner, corner + size[:, None]], axis=1).astype(np.float32),
        label=label,
        true_label=label,
        score=rng.uniform(0.3, 1, rows).astype(np.float32),
        kind=np.where(found, CORRECT, wrong).astype(np.uint8),
        partner=np.where(found, np.where(is_detection, -number, number), 0).astype(np.int32),
        iou=rng.uniform(0.1, 1, rows).astype(np.float32),
        loss=rng.uniform(0, 1, rows).astype(np.float32),
        size=size,
        level=rng.integers(0, LEVELS, rows).astype(np.int32),
        weights=weights,
    )


def _layer(outcomes: Outcomes, name: str) -> dict:
    weights = outcomes.weights[name]
    layer = LayerStatistics(EXPERTS)
    rows = np.arange(len(outcomes))
    nowhere = np.full((len(outcomes), 2), np.nan)
    layer.add(DecisionRecords(outcomes.image, rows, outcomes.level, nowhere, weights))
    attributes = {
        'size': (SIZES, size_bin(outcomes.size)),
        'size_coco': (COCO_SIZES, coco_size_bin(outcomes.size)),
        'class': (Bins([f'class {i}' for i in range(CLASSES)]), outcomes.label),
    }
    objects = {}
    for attribute, (bins, values) in attributes.items():
        table = Association(len(bins), EXPERTS)
        ones = np.ones(len(outcomes))
        table.add(np.arange(len(outcomes)), values, ones, weights, outcomes.image)
        objects[attribute] = table.result(permutations=1).as_dict(bins)
    summary = layer.as_dict(permutations=1)
    summary['associations']['objects'] = objects
    return {'top_k': 2, 'granularity': 'image', **summary}
