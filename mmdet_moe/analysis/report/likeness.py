"""Which experts are alike, and what a training changes: sentences and figures."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from mmdet_moe.analysis.statistics.similarity import mean_between
from mmdet_moe.drawing import PAGE_WIDTH, new_figure, plot_heat_map, wrapped

#: Experts whose outputs have this mean cosine are called near copies.
NEAR_COPIES = 0.95
_MAX_NUMBERS = 8  # experts up to which a heat map has numbers


def likeness(experts: dict) -> list[str]:
    """What ``similarity`` and ``stability`` of ``experts.json`` say, a sentence for each layer.

    Args:
        experts: The content of ``experts.json``.
    """
    sentences = []
    for name, layer in experts['layers'].items():
        outputs = (layer.get('similarity') or {}).get('outputs')
        cosine = mean_between(outputs['cosine']) if outputs else None
        if cosine is None:
            continue
        cka = mean_between(outputs['cka'])
        numbers = f'cosine {cosine:.2f}' + ('' if cka is None else f', CKA {cka:.2f}')
        numbers = f'what two experts make of the same inputs has in the mean {numbers}'
        # Alike in what differs from place to place, too, which a common mean would hide.
        alike = cosine >= NEAR_COPIES and (cka is None or cka >= NEAR_COPIES)
        sentences.append(f'{name}: {"near copies: " if alike else ""}{numbers}.')
    for other in experts.get('stability') or []:
        sentences += _stability(other)
    return sentences


def _stability(other: dict) -> Iterator[str]:
    for name, shares in other['layers'].items():
        renumbered = ''
        if shares['changed_relabelled'] < shares['changed'] - 0.005:
            renumbered = (
                f'; with experts renumbered {_percent(shares["changed_relabelled"])}, '
                f'{_percent(shares["changed_relabelled_by_chance"])} by chance'
            )
        yield (
            f'{name}: against {other["run"]}, {_percent(shares["changed"])} of '
            f'{shares["num_decisions"]:,} decisions have another main expert '
            f'({_percent(shares["changed_by_chance"])} by chance{renumbered}).'
        )
    if other['reason']:
        yield f'Decisions are not compared with those of {other["run"]}: {other["reason"]}.'


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'


def draw_similarity(layer: str, found: dict) -> Figure:
    """The matrices of similarity, and the tree of the experts.

    Args:
        layer: Its name.
        found: Its ``similarity`` in ``experts.json``, without a ``reason``.

    Returns:
        The figure, to be drawn within :func:`mmdet_moe.drawing.style`.
    """
    matrices = {'weights\ncosine': found['weights']['cosine']}
    if found['outputs']:
        matrices['outputs\ncosine'] = found['outputs']['cosine']
        matrices['outputs\nlinear CKA'] = found['outputs']['cka']
    experts = len(found['weights']['cosine'])
    figure = new_figure(PAGE_WIDTH, 2.6)
    title = f'{layer}: how alike the experts are\n'
    if found['outputs']:
        title += f'outputs on the same {found["outputs"]["num_examples"]:,} places; '
    figure.suptitle(wrapped(f'{title}tree by the {found["linkage_of"]}', PAGE_WIDTH))
    *panels, tree = figure.subplots(1, len(matrices) + 1)
    ticks = [str(e) if e % -(-experts // 8) == 0 else '' for e in range(experts)]
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        values = np.array(matrix, float)
        numbers = '.2f' if experts <= _MAX_NUMBERS else None
        mesh = plot_heat_map(axes, values.clip(min=0), ticks, ticks, 1.0, numbers, 6)
        axes.set_title(name)
        axes.set_aspect('equal')
        axes.set_xlabel('expert')
    bar = figure.colorbar(mesh, ax=panels, pad=0.01, aspect=30, location='bottom', shrink=0.5)
    bar.set_label('similarity (0 if below)')
    _tree(tree, found['linkage'])
    tree.set_ylabel('1 − linear CKA' if found['linkage_of'] == 'outputs' else '1 − cosine')
    return figure


def _tree(axes: Axes, linkage: Sequence[Sequence[float]]) -> None:
    with_lines = dendrogram(
        np.array(linkage), ax=axes, color_threshold=0, above_threshold_color='black'
    )
    axes.tick_params(axis='x', labelsize=7 if len(with_lines['leaves']) <= 16 else 4)
    axes.set_xlabel('expert')
    axes.set_ylim(bottom=0)


def draw_similarity_over_training(layer: str, training: dict) -> Figure:
    """Cosine of the experts' weights over the checkpoints: mean, and the range of all pairs.

    Args:
        layer: Its name.
        training: Its ``similarity.training`` in ``experts.json``.

    Returns:
        The figure, to be drawn within :func:`mmdet_moe.drawing.style`.
    """
    figure = new_figure(PAGE_WIDTH / 2, 2.4)
    figure.suptitle(wrapped(f"{layer}: cosine of two experts' weights", PAGE_WIDTH / 2))
    axes = figure.add_subplot()
    least, mean, most = (np.array(training[key], float) for key in ('least', 'mean', 'most'))
    axes.fill_between(training['step'], least, most, color='0.85', label='all pairs')
    axes.plot(training['step'], mean, 'ko-', markersize=3, label='mean')
    axes.set_xlabel('iteration or epoch of the checkpoint')
    axes.set_ylabel('cosine')
    figure.legend(loc='outside lower center', ncols=2)
    return figure
