"""Figures of the choices: are they good, who confuses what, how do they go on in the next layer?

Called by :mod:`~mmdet_moe.analysis.report.figures`, which names the files.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmdet_moe.analysis.statistics.inference import TOO_FEW
from mmdet_moe.drawing import PAGE_WIDTH, new_figure, plot_heat_map, wrapped

#: Rows of regret by class: those where most is lost.
MAX_CLASSES = 12
#: Experts and classes that confusions are drawn of, those that see most and occur most.
MAX_CONFUSED_EXPERTS, MAX_CONFUSED_CLASSES = 8, 20


def draw_counterfactual(layer: str, found: dict) -> Figure:
    """Mean score under the choice and its alternatives, and what the choice loses by what.

    Args:
        layer: Its name.
        found: ``layers[name].counterfactual`` of ``experts.json``.
    """
    is_score = found['measure'] == 'score'
    things = 'objects' if is_score else 'images'
    best = found['best_single_expert']
    left = [
        ('the best expert for each', found['oracle']),
        ('the model as it is', found['model']),
        ('main expert alone', found['chosen']),
        ('a random expert', found['random']),
        *(
            (f'expert {e} for all' + (' (best)' if e == best else ''), entry)
            for e, entry in enumerate(found['alone'])
        ),
    ]
    classes = sorted(
        (entry for entry in found['regret_by_class'].items() if entry[1]['num']),
        key=lambda entry: -entry[1]['value'] * entry[1]['num'],
    )[:MAX_CLASSES]
    right = [
        (f'all {things}', found['regret']),
        *((f'main expert {e}', entry) for e, entry in enumerate(found['regret_by_expert'])),
        *((f'{name} objects', e) for name, e in (found['regret_by_size'] or {}).items()),
        *((f'class {name}', entry) for name, entry in classes),
    ]
    right = [row for row in right if row[1]['num']]
    measure = 'score of the object' if is_score else 'share of images that are right'
    better, high = found['over_random'], 100 * found['best_share']['value']
    known = '{:+.3f} to {:+.3f}'.format(*better['interval']) if better['interval'] else TOO_FEW
    number = f'{found["num_objects"]:,} {things}'
    if is_score:
        number += f' of {found["num_images"]:,} images'
    title = (
        f'{layer}: is the choice of the expert a good one? {number}\nmain expert minus a random '
        f'one {better["value"]:+.3f} ({known}); '
        f'the best one is chosen for {high:.0f} % of the {things}, by a random choice for '
        f'{100 * found["best_share_random"]["value"]:.0f} %'
    )
    if len(classes) < sum(entry['num'] > 0 for entry in found['regret_by_class'].values()):
        title += f'; the {MAX_CLASSES} classes where most is lost'
    rows = max(len(left), len(right))
    figure = new_figure(PAGE_WIDTH, 1.5 + 0.19 * rows)
    figure.suptitle(wrapped(title, PAGE_WIDTH))
    panels = figure.subplots(1, 2)
    _dots(panels[0], left, f'mean {measure}')
    _dots(panels[1], right, 'regret: best expert minus main expert')
    for axes in panels:
        axes.set_ylim(rows - 0.5, -0.5)
    panels[1].set_xlim(left=0)
    return figure


def _dots(axes: Axes, rows: Sequence[tuple[str, dict]], label: str) -> None:
    """Means with their 95 % intervals, and how many things they are of."""
    places = np.arange(len(rows))
    values = np.array([entry['value'] for _, entry in rows], float)
    intervals = np.array([entry['interval'] or (np.nan, np.nan) for _, entry in rows], float)
    axes.hlines(places, *intervals.T, color='0.55', linewidth=2.5)
    axes.plot(values, places, 'o', color='black', markersize=3.5)
    numbers = [entry['num'] for _, entry in rows]
    for place, value, number in zip(places, values, numbers, strict=True):
        text = f'{value:.3f}' if len(set(numbers)) == 1 else f'{value:.3f} (n = {number:,})'
        axes.annotate(
            text, (1, place), xycoords=axes.get_yaxis_transform(), xytext=(4, 0),
            textcoords='offset points', va='center', fontsize=6.5,
        )  # fmt: skip
    axes.set_yticks(places, [name if len(name) < 28 else f'{name[:27]}…' for name, _ in rows])
    axes.grid(axis='y', color='0.92', linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(f'{label}\n(bar: 95 % interval, bootstrap over images)')


def draw_confusions(layer: str, confusion: dict) -> Figure:
    """True against predicted class, one panel for each expert alone; rows sum to 1.

    Args:
        layer: Its name.
        confusion: ``layers[name].counterfactual.confusion`` of ``experts.json``.
    """
    counts = np.array(confusion['counts'], float)
    is_detector = confusion['score_thr'] is not None
    classes = len(confusion['true']) - is_detector
    of_class = counts[0, :classes].sum(1)
    shown = np.sort(np.argsort(-of_class, kind='stable')[:MAX_CONFUSED_CLASSES])
    others = [classes] if is_detector else []
    rows = columns = [*shown, *others]
    experts = range(min(len(counts), MAX_CONFUSED_EXPERTS))
    across = min(len(experts), 4 if len(rows) <= 12 else 2)
    down = math.ceil(len(experts) / across)
    side = PAGE_WIDTH / across
    figure = new_figure(PAGE_WIDTH, (0.85 * side + 0.25) * down + 0.9)
    title = (
        f'{layer}: what each expert alone takes for what\nshare of the objects of a class (rows) '
        'that are predicted as a class (columns)'
    )
    if is_detector:
        title = (
            f'{title}, detections with a score of at least {confusion["score_thr"]:g}; '
            'last row: detections of nothing, divided among the classes'
        )
    if len(shown) < classes:
        title += f'; {len(shown)} of {classes} classes, the most frequent ones'
    if len(experts) < len(counts):
        title += f'; the first {len(experts)} of {len(counts)} experts'
    figure.suptitle(wrapped(title, PAGE_WIDTH))
    panels = figure.subplots(down, across, squeeze=False).ravel()
    names = [_short(confusion['true'][r]) for r in rows]
    predicted = [_short(confusion['predicted'][c]) for c in columns]
    for e in experts:
        table = counts[e] / np.maximum(counts[e].sum(1, keepdims=True), 1)
        cells = table[np.ix_(rows, columns)]
        mesh = plot_heat_map(panels[e], cells, names, predicted, 1.0, None)
        for (r, c), value in np.ndenumerate(cells):
            if value >= 0.1 and len(rows) <= 12:
                panels[e].text(
                    c, r, f'{value:.1f}'.removeprefix('0'), ha='center', va='center', fontsize=5,
                    color='white' if value > 0.5 else 'black',
                )  # fmt: skip
        panels[e].set_title(f'expert {e} alone', pad=3)
        panels[e].tick_params(labelsize=5.5)
        panels[e].tick_params(axis='x', rotation=90)
        panels[e].tick_params(labelleft=e % across == 0, labelbottom=e + across >= len(experts))
    for axes in panels[len(experts) :]:
        axes.set_axis_off()
    bar = figure.colorbar(mesh, ax=list(panels), pad=0.01, aspect=30, shrink=0.7)
    bar.set_label('share of a row')
    return figure


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f'{name[: most - 1]}…'
