"""What the figures of the choices draw: every mean at its place, rows that sum to 1."""

import numpy as np
import pytest

from mmdet_moe.analysis.report.choices import (
    MAX_CLASSES,
    MAX_CONFUSED_CLASSES,
    draw_confusions,
    draw_counterfactual,
)
from mmdet_moe.analysis.statistics.counterfactual import Alone, summary
from mmdet_moe.drawing import style


@pytest.fixture
def found():
    """Three experts, 40 images with two objects each, of 30 classes."""
    rng = np.random.default_rng(0)
    scores = rng.random((80, 3))
    classes = [f'class {c}' for c in range(30)]
    alone = Alone(
        np.repeat(np.arange(40), 2), rng.integers(0, 30, 80), rng.uniform(10, 200, 80),
        rng.integers(0, 3, 80), scores.mean(1), scores,
    )  # fmt: skip
    return summary(alone, rng.integers(0, 9, (3, 31, 31)), classes, 0.3)


def test_means_and_regrets(found):
    with style():
        figure = draw_counterfactual('head.cls_moe', found)
        figure.canvas.draw()
    left, right = figure.axes
    names = [text.get_text() for text in left.get_yticklabels()]
    best = found['best_single_expert']
    assert names[:4] == [
        'the best expert for each', 'the model as it is', 'main expert alone', 'a random expert',
    ]  # fmt: skip
    assert names[4 + best] == f'expert {best} for all (best)'
    entries = [found[key] for key in ('oracle', 'model', 'chosen', 'random')] + found['alone']
    (points,) = left.lines
    np.testing.assert_allclose(points.get_xdata(), [entry['value'] for entry in entries])
    segments = left.collections[0].get_segments()
    np.testing.assert_allclose(
        [segment[:, 0] for segment in segments], [entry['interval'] for entry in entries]
    )
    shown = [text.get_text() for text in right.get_yticklabels()]
    assert shown[0] == 'all objects'
    assert len(shown) == 1 + 3 + 3 + MAX_CLASSES
    assert f'the {MAX_CLASSES} classes where most is lost' in figure._suptitle.get_text().replace(
        '\n', ' '
    )


def test_confusions(found):
    with style():
        figure = draw_confusions('head.cls_moe', found['confusion'])
        figure.canvas.draw()
    counts = np.array(found['confusion']['counts'], float)
    shown = np.sort(np.argsort(-counts[0, :30].sum(1), kind='stable')[:MAX_CONFUSED_CLASSES])
    places = [*shown, 30]
    for expert, axes in enumerate(figure.axes[:3]):
        cells = axes.collections[0].get_array().reshape(len(places), len(places))
        shares = counts[expert] / counts[expert].sum(1, keepdims=True)
        np.testing.assert_allclose(cells, shares[np.ix_(places, places)])
        assert axes.get_title() == f'expert {expert} alone'
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [f'class {c}' for c in shown] + ['background']
    assert '20 of 30 classes' in figure._suptitle.get_text().replace('\n', ' ')
