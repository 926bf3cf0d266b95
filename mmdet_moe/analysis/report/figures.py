"""The figures of an expert analysis, for papers: PNG and vector PDF, readable in greyscale.

``<layer>/<figure>.png`` and ``.pdf``, with these figures for each layer (``all`` for
interventions on all layers at once); <source> is ``decisions``, ``objects`` or ``detections``:

===============================  =================================================================
``usage``                        load and importance of the experts, with 95 % intervals
``information``                  what the choice of the expert depends on: mutual information
``coactivation``                 which experts are chosen together
``similarity``                   how alike the experts' weights and outputs are, and their tree
``similarity_training``          how alike their weights are over the training
``history``                      load and importance over the training
``interventions``                change of the metrics with experts taken away or equalised
``polysemanticity``              which classes hang on which expert
``counterfactual``               whether the main expert is the best one, and what is lost by whom
``confusion``                    what each expert alone takes for what
``<source>_size_given_expert``   which sizes does an expert see
``<source>_expert_given_size``   who sees which size
``<source>_size_coco``           the same for COCO's three sizes
``<source>_class``               who sees which class, sorted by the main expert
``<source>_superclass``          who sees which super-class
``<source>_cluster``             who sees which hidden cluster of the data
``<source>_dataset``             who sees which of the data sets that are joined
``<source>_level``               who works on which pyramid level
``<source>_position``            who sees which part of the image
===============================  =================================================================

Heat maps of shares have the same scale for all experts and runs; cells in which nothing but chance
is seen are faded. What has no data (a classifier's sizes, say) gets no figure. Of very many experts
those with the most weight are drawn (:mod:`~mmdet_moe.analysis.report.shown`), and the title says
so.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.report.choices import draw_confusions, draw_counterfactual
from mmdet_moe.analysis.report.likeness import draw_similarity, draw_similarity_over_training
from mmdet_moe.analysis.report.shown import SIGNIFICANT_CELL, shown_interventions, shown_layer
from mmdet_moe.analysis.statistics.bins import COCO_LIMITS
from mmdet_moe.analysis.statistics.polysemanticity import class_drops
from mmdet_moe.drawing import (
    MAX_STYLES,
    PAGE_WIDTH,
    darkest,
    expert_styles,
    expert_ticks,
    level_names,
    new_figure,
    plot_heat_map,
    plot_over_training,
    style,
    to_bytes,
    wrapped,
)

#: Bins with fewer things are faded: their shares are noise.
FEW_THINGS = 10
#: A heat map shows at most this many classes, those with the most things.
MAX_CLASSES = 200
#: So many experts, and classes, at most are shown with their drops.
MAX_DRAWN = 64

_ROWS_PER_COLUMN = 50
_SUFFIXES = ('png', 'pdf')
_GREY = '0.82'


def write_figures(experts: dict, folder: Path) -> list[Path]:
    """Draw everything, in place of all figures that an earlier analysis has left there.

    Args:
        experts: The content of ``experts.json``.
        folder: Where to; made if it does not exist. Files that are no such figures are kept.

    Returns:
        The files written.
    """
    paths = []
    with style():
        for layer, name, figure in draw_figures(experts):
            paths += write_figure(figure, folder_of(folder, layer), name)
    # Or the report would show them, and a reader take them for this run's.
    for path in {*folder.glob('*/*'), *folder.glob('polysemanticity.*')} - set(paths):
        if _DRAWN.fullmatch(path.name):
            path.unlink()
    return paths


def folder_of(folder: Path, layer: str) -> Path:
    """Where the figures of a layer are."""
    return folder / layer.replace('/', '_').replace('\\', '_')


def write_comparison(runs: Sequence[dict], folder: Path) -> list[Path]:
    """Write what several runs show together, :func:`draw_polysemanticity`.

    Args:
        runs: Contents of ``experts.json``.
        folder: Where to; made if it does not exist.

    Returns:
        The files written; none if there is nothing to draw.
    """
    with style():
        figure = draw_polysemanticity(runs)
        return [] if figure is None else write_figure(figure, folder, 'polysemanticity')


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write one figure, drawn within :func:`mmdet_moe.drawing.style`, in all formats."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in _SUFFIXES:
        # Not with_suffix, for the sake of dots in names.
        paths.append(write_file(folder / f'{name}.{suffix}', to_bytes(figure, suffix)))
        # Found once, the layout serves the second file as well.
        figure.set_layout_engine('none')
    return paths


def draw_figures(experts: dict) -> Iterator[tuple[str, str, Figure]]:
    """Draw one figure after the other, within :func:`mmdet_moe.drawing.style`.

    Yields:
        ``(layer, figure's name, figure)`` as in the names of the files.
    """
    histories = experts.get('history') or {}
    metrics, interventions = experts['metrics'] or {}, experts['interventions']
    for name, layer in experts['layers'].items():
        layer = shown_layer(layer)
        yield name, 'usage', _usage(name, layer)
        if (figure := _information(name, layer, experts['run'])) is not None:
            yield name, 'information', figure
        yield name, 'coactivation', _coactivation(name, layer)
        similarity = layer.get('similarity') or {}
        if similarity.get('weights'):
            yield name, 'similarity', draw_similarity(name, similarity)
        if similarity.get('training'):
            drawn = draw_similarity_over_training(name, similarity['training'])
            yield name, 'similarity_training', drawn
        if name in histories and histories[name]['step']:
            yield name, 'history', _history(name, histories[name])
        for source, attributes in layer['associations'].items():
            things = _things(source, experts['run'])
            for attribute, association in attributes.items():
                if not association.get('counts') or not np.sum(association['counts']):
                    continue
                for figure, draw in _FIGURES.get(attribute, {}).items():
                    yield name, f'{source}_{figure}', draw(name, things, association)
        drops = class_drops(name, metrics, interventions)
        if any(drop.any() for drop in drops.values()):
            yield name, 'polysemanticity', _polysemanticity(name, layer, metrics, drops)
        if (alone := layer.get('counterfactual')) and alone['num_objects']:
            yield name, 'counterfactual', draw_counterfactual(name, alone)
            if alone['confusion']:
                yield name, 'confusion', draw_confusions(name, alone['confusion'])
    for name in dict.fromkeys(entry['layer'] for entry in interventions):
        entries = [entry for entry in interventions if entry['layer'] == name]
        figure = _interventions(name, entries, metrics)
        if figure is not None:
            yield name, 'interventions', figure


# Size --------------------------------------------------------------------------------------------


def _size_given_expert(layer: str, things: str, association: dict) -> Figure:
    """One panel per expert: what it sees (dark line) against what there is (grey)."""
    counts, number = np.array(association['counts']), _numbers(association)
    shares = np.array(association['bin_given_expert'])
    everything = number / number.sum()
    edges = _finite(association['edges'])
    ids = _ids(association, counts.shape[1])
    experts = len(ids)
    columns = min(experts, 4) if experts <= 16 else 8
    rows = math.ceil(experts / columns)
    row_height = 1.35 if experts <= 16 else 0.95
    figure = new_figure(PAGE_WIDTH, row_height * rows + 2.2)
    _title(figure, f'{layer}: sizes of the {things} that each expert sees', association)
    grid = figure.add_gridspec(
        rows + 1, columns, height_ratios=[row_height] * rows + [1.1], hspace=0.04
    )
    top = 1.12 * max(shares.max(), everything.max())
    first = None
    for e in range(experts):
        axes = figure.add_subplot(grid[e // columns, e % columns], sharex=first, sharey=first)
        first = first or axes
        axes.stairs(everything, edges, fill=True, color=_GREY)
        axes.stairs(shares[:, e], edges, color='black', linewidth=1.1)
        axes.set_title(
            f'expert {ids[e]} (n = {_number(counts[:, e].sum())})'
            if experts <= 16
            else f'{ids[e]}',
            pad=3,
            fontsize=7.5,
        )
        axes.set_ylim(0, top)
        axes.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
        axes.tick_params(labelleft=e % columns == 0, labelsize=6.5)
        if e % columns == 0:
            axes.set_ylabel('share')
        px_axis(axes, edges, PAGE_WIDTH / columns - 0.35)
    _counts_panel(figure.add_subplot(grid[rows, :]), association, edges, things)
    handles = [
        Patch(facecolor='none', edgecolor='black', label=f'share of the {things} of an expert'),
        Patch(facecolor=_GREY, label=f'share of all {things}'),
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=2)
    return figure


def _expert_given_size(layer: str, things: str, association: dict) -> Figure:
    """The shares of the experts in every bin, over the number of things in it."""
    shares = np.array(association['expert_given_bin'])
    edges = _finite(association['edges'])
    experts = shares.shape[1]
    figure = new_figure(PAGE_WIDTH, 3.7 if experts <= 16 else 5.2)
    _title(figure, f'{layer}: which expert sees {things} of which size', association)
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=(2.6 if experts <= 16 else 4, 1)
    )
    handles = []
    if experts <= MAX_STYLES:
        stack_shares(upper, shares, edges)
        # From top to bottom, as the areas are stacked.
        handles = upper.get_legend_handles_labels()[0][::-1]
        upper.set_ylim(0, 1)
        upper.set_ylabel(f'share of the {things}\nof a size')
    else:
        mesh = upper.pcolormesh(
            edges, np.arange(experts + 1) - 0.5, shares.T, cmap='Greys', vmin=0, vmax=shares.max()
        )
        upper.set_ylim(experts - 0.5, -0.5)
        ticks = _ticks(association, experts)
        shown = [e for e in range(experts) if ticks[e]]
        upper.set_yticks(shown, [ticks[e] for e in shown])
        upper.set_ylabel('expert')
        bar = figure.colorbar(mesh, ax=[upper, lower], pad=0.01, shrink=0.8)
        bar.set_label(f'share of the {things} of a size')
    few = [b for b, n in enumerate(_numbers(association)) if 0 < n < FEW_THINGS]
    for b in few:
        upper.axvspan(edges[b], edges[b + 1], facecolor='white', alpha=0.7, linewidth=0)
    if few and handles:
        handles.append(
            Patch(
                facecolor='0.93', edgecolor='0.7', label=f'faded: fewer\nthan {FEW_THINGS} {things}'
            )
        )
    if handles:
        figure.legend(handles=handles, loc='outside right center', handleheight=1.4)
    px_axis(upper, edges, 5.5, on_dark=True)
    _counts_panel(lower, association, edges, things)
    upper.tick_params(labelbottom=False)
    return figure


def stack_shares(axes: Axes, shares: np.ndarray, edges: np.ndarray) -> None:
    """Areas on top of each other, with a handle for the legend for each expert.

    Args:
        axes: Where to draw.
        shares: (B, E), rows sum to 1, or to 0 where there is nothing; at most
            :data:`~mmdet_moe.drawing.MAX_STYLES` experts.
        edges: (B + 1,).
    """
    below = np.zeros(len(shares))
    for e, look in enumerate(expert_styles(shares.shape[1])):
        axes.stairs(
            below + shares[:, e], edges, baseline=below, fill=True, facecolor=look.colour,
            edgecolor=look.contrast, hatch=look.hatch, linewidth=0.4, label=f'expert {e}',
        )  # fmt: skip
        below = below + shares[:, e]


def _counts_panel(axes: Axes, association: dict, edges: np.ndarray, things: str) -> None:
    """How many things each bin holds, with COCO's names of the sizes."""
    number = _numbers(association)
    names = association['bins']
    is_open = str(names[0]).startswith('<') or str(names[-1]).startswith(('>', '≥'))
    axes.stairs(number, edges, fill=True, color='0.55')
    axes.set_ylabel(f'number of\n{things}')
    axes.set_ylim(0, 1.3 * max(number.max(), 1))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=2))
    axes.set_xlabel(
        f'√area of the {things} (px of the original image'
        + ('; the outermost bins are open)' if is_open else ')')
    )
    px_axis(axes, edges, 5.5)
    limits = [edges[0], *COCO_LIMITS, edges[-1]]
    span = math.log(edges[-1] / edges[0])
    for name, low, high in zip(('small', 'medium', 'large'), limits[:-1], limits[1:], strict=True):
        low, high = max(low, edges[0]), min(high, edges[-1])
        # Not where the word would not fit.
        if high > low and math.log(high / low) > 0.08 * span:
            axes.text(
                math.sqrt(low * high), 0.97, name, transform=axes.get_xaxis_transform(),
                ha='center', va='top', fontsize=7, style='italic',
            )  # fmt: skip


def px_axis(axes: Axes, edges: np.ndarray, width: float, on_dark: bool = False) -> None:
    """A logarithmic axis in px with COCO's limits marked; ``width`` inches are about there."""
    axes.set_xscale('log', base=2)
    axes.set_xlim(edges[0], edges[-1])
    for limit in COCO_LIMITS:
        if edges[0] < limit < edges[-1]:
            if on_dark:
                axes.axvline(limit, color='white', linewidth=1.6, zorder=3)
            axes.axvline(limit, color='black', linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=3)
    ticks = _px_ticks(edges[0], edges[-1], width)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda x, _: f'{x:g}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _px_ticks(low: float, high: float, width: float) -> list[float]:
    """COCO's limits, and powers of two as far as they do not come too close."""
    gap = 0.3 / max(width, 0.3) * math.log2(high / low)
    ticks = [float(x) for x in COCO_LIMITS if low <= x <= high]
    powers = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    # Far from the limits first: in doubt 8 and 256 rather than 16 and 128.
    powers.sort(key=lambda x: (round(math.log2(x)) % 2 == 0, x))
    for x in powers:
        if all(abs(math.log2(x / tick)) >= gap for tick in ticks):
            ticks.append(x)
    return sorted(ticks)


def _finite(edges: Sequence[float | None]) -> np.ndarray:
    """Edges for a logarithmic axis; open bins at the ends get the width of their neighbour."""
    values = np.array([math.inf if x is None else x for x in edges], dtype=float)
    if not math.isfinite(values[-1]):
        values[-1] = values[-2] ** 2 / values[-3] if len(values) > 3 else 2 * values[-2]
    if not 0 < values[0] < math.inf:
        values[0] = values[1] ** 2 / values[2] if len(values) > 3 else values[1] / 2
    return values


# Heat maps ---------------------------------------------------------------------------------------


def _class(layer: str, things: str, association: dict) -> Figure:
    shares = np.array(association['expert_given_bin'])
    number = _numbers(association)
    shown = np.sort(np.argsort(-number, kind='stable')[:MAX_CLASSES])
    title = f'{layer}: which expert sees which class of the {things}'
    if len(shown) < len(number):
        title += f' ({len(shown)} of {len(number)} classes, those with the most {things})'
    # By main expert, the surest first; last what none of the experts sees.
    main = np.where(shares.any(1), shares.argmax(1), shares.shape[1])
    order = shown[np.lexsort((-shares.max(1)[shown], main[shown]))]
    return _heat_maps(title, things, association, order)


def _in_order(title: str) -> Callable[[str, str, dict], Figure]:
    """Draws the bins as they are, under a title in which ``{}`` are the things."""

    def draw(layer: str, things: str, association: dict) -> Figure:
        return _heat_maps(f'{layer}: which expert sees {title.format(things)}', things, association)

    return draw


def _level(layer: str, things: str, association: dict) -> Figure:
    title = f'{layer}: which expert sees the {things} of which pyramid level'
    names = association['bins']
    if list(names) == [str(level) for level in range(len(names))]:
        association = {**association, 'bins': level_names(len(names))}
    return _heat_maps(title, things, association, row_height=0.3)


def _heat_maps(
    title: str,
    things: str,
    association: dict,
    order: Sequence[int] | None = None,
    row_height: float = 0.2,
) -> Figure:
    """Share of each expert in every bin, and how many things the bin holds.

    Long lists are broken into several columns, as far as the page is wide enough.
    """
    number = _numbers(association)
    shares = np.array(association['expert_given_bin'])
    order = np.arange(len(number)) if order is None else np.asarray(order)
    experts = shares.shape[1]
    widest = 4 if experts <= 4 else 3 if experts <= 8 else 2 if experts <= 16 else 1
    if _faded(association).any():
        title += f'\nfaded: cells with p > {SIGNIFICANT_CELL:g}'
    columns = min(math.ceil(len(order) / _ROWS_PER_COLUMN), widest)
    rows = math.ceil(len(order) / columns)
    crowded = rows > 25
    row_height = 0.125 if crowded else row_height
    fontsize = 6 if crowded else 7
    width = PAGE_WIDTH if columns > 1 or experts > 16 else min(PAGE_WIDTH, 3.2 + 0.3 * experts)
    figure = new_figure(width, row_height * rows + 1.5)
    _title(figure, title, association)
    numbers = '.2f' if experts <= 16 and columns == 1 and not crowded else None
    vmax, faded = darkest(experts), _faded(association)
    ticks = _ticks(association, experts, most=16 if columns == 1 else 8)
    for panel, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        chosen = order[panel * rows : (panel + 1) * rows]
        labels = [_shortened(str(association['bins'][b]), 30 // columns + 6) for b in chosen]
        mesh = plot_heat_map(axes, shares[chosen], labels, ticks, vmax, numbers, 6.5, faded[chosen])
        # All panels have the same number of rows, so that the cells are equally high.
        axes.set_ylim(rows - 0.5, -0.5)
        axes.tick_params(axis='both', labelsize=fontsize)
        axes.set_xlabel('expert')
        for place, text in [
            (-0.5 - 4 / (72 * row_height), 'n'),
            *((row, _number(number[b])) for row, b in enumerate(chosen)),
        ]:
            slant = 'italic' if text == 'n' else 'normal'
            _beside(axes, place, text, 3, fontsize=fontsize, style=slant)
    if numbers is None:
        height = row_height * rows
        low = height < 2.5
        bar = figure.colorbar(
            mesh, ax=figure.axes, location='bottom' if low else 'right', pad=0.02, aspect=30,
            shrink=0.6 if low else min(1, 4 / height),
        )  # fmt: skip
        bar.set_label(f'share of the {things} of a row')
    return figure


def _position(layer: str, things: str, association: dict) -> Figure:
    """The image in 3 x 3 cells, row by row: one panel per expert, and how many things there are."""
    shares = np.array(association['expert_given_bin'])
    bins, experts = shares.shape
    ids = _ids(association, experts)
    side = math.isqrt(bins)
    columns = min(experts + 1, 6 if experts <= 16 else 9)
    rows = math.ceil((experts + 1) / columns)
    size = PAGE_WIDTH / max(columns, 4)
    figure = new_figure(PAGE_WIDTH if columns > 3 else size * columns + 0.6, size * rows + 0.9)
    title = f'{layer}: which expert sees the {things} of which part of the image'
    if (faded := _faded(association)).any():
        title += f'\nfaded: cells with p > {SIGNIFICANT_CELL:g}'
    _title(figure, title, association)
    fontsize = 6.5 if columns <= 6 else None
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    blank = [''] * side
    vmax = darkest(experts)
    for e in range(experts):
        cells = shares[:, e].reshape(side, side)
        mesh = plot_heat_map(
            panels[e], cells, blank, blank, vmax, '.2f' if fontsize else None, fontsize,
            faded[:, e].reshape(side, side),
        )  # fmt: skip
        panels[e].set_title(f'expert {ids[e]}' if columns <= 6 else str(ids[e]), pad=3)
    number = _numbers(association).reshape(side, side)
    plot_heat_map(
        panels[experts], number, blank, blank, number.max(), ',.0f' if fontsize else None, fontsize
    )
    panels[experts].set_title(f'number of\n{things}' if columns <= 6 else 'number', pad=3)
    for axes in panels:
        axes.set_aspect('equal')
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
    for axes in panels[experts + 1 :]:
        axes.set_axis_off()
    bar = figure.colorbar(mesh, ax=list(panels), pad=0.02, aspect=15 * rows)
    bar.set_label(f'share of the {things}\nof a cell')
    return figure


def _coactivation(layer: str, content: dict) -> Figure:
    values = np.array(content['coactivation'])
    experts = len(values)
    numbers = '.2f' if experts <= 10 else None
    side = min(5.0, 1.6 + 0.33 * experts)
    title = f'{layer}: experts that are chosen together\nshare of the decisions; on the diagonal, '
    title += f'chosen at all (top {content["top_k"]} of {content["num_experts"]})'
    if content.get('kind') == 'factorised':
        title = (
            f'{layer}: experts whose coefficients are above 0 together\nshare of the decisions; '
        )
        title += 'on the diagonal, above 0 at all'
    figure = _titled(_noted(title, content), side + 1.2, side + 0.6)
    axes = figure.add_subplot()
    ticks = _ticks(content, experts)
    mesh = plot_heat_map(axes, values, ticks, ticks, 1.0, numbers, 6.5)
    axes.set_yticks([e for e in range(experts) if ticks[e]], [t for t in ticks if t])
    axes.set_aspect('equal')
    axes.set_xlabel('expert')
    axes.set_ylabel('expert')
    figure.colorbar(mesh, ax=axes, pad=0.02, shrink=0.8).set_label('share of the decisions')
    return figure


# Bars and lines ----------------------------------------------------------------------------------


def _usage(layer: str, content: dict) -> Figure:
    count, experts = content['num_experts'], len(content['load'])
    width = min(PAGE_WIDTH, 3.0 + 0.35 * experts)
    dead = content['dead_experts']
    title = (
        f'{layer}: use of the experts\nsquared coefficient of variation of the load '
        f'{content["load_cv2"]:.3f}, entropy {content["usage_entropy"]:.2f} of at most '
        f'{math.log(count):.2f} nats'
    )
    names = ('load', 'importance')
    if content.get('kind') == 'factorised':
        title = title.replace('of the load', 'of how often coefficients are above 0:')
        names = ('share of the\ncoefficients above 0', 'mean coefficient')
    figure = _titled(_noted(title, content), width, 2.6)
    axes = figure.add_subplot()
    places = np.arange(experts)
    axes.bar(places - 0.2, content['load'], 0.38, color='0.35', label=names[0])
    axes.bar(
        places + 0.2, content['importance'], 0.38, color='0.92', edgecolor='black', linewidth=0.5,
        hatch='////', label=names[1],
    )  # fmt: skip
    for key, offset in (('load', -0.2), ('importance', 0.2)):
        if ends := content.get(f'{key}_interval'):
            axes.vlines(places + offset, *np.array(ends).T, color='black', linewidth=1)
    axes.axhline(1 / count, color='black', linewidth=0.8, linestyle='--', label='fair share')
    for e in dead:
        # The cross stands where the bars would.
        axes.plot(
            e, 0.03, 'kx', markersize=5, transform=axes.get_xaxis_transform(), zorder=5,
            label='dead' if e == dead[0] else None,
        )  # fmt: skip
    ticks = _ticks(content, experts)
    axes.set_xticks(places, ticks)
    axes.set_xlim(-0.6, experts - 0.4)
    axes.set_xlabel('expert')
    axes.set_ylabel('share')
    figure.legend(loc='outside right center')
    return figure


def _information(layer: str, content: dict, run: dict) -> Figure | None:
    """Mutual information of each attribute with the expert, by itself and given others.

    With intervals, what chance gives, the largest value possible, and, where they are known,
    routers with random weights and one that knows the level alone. None where nothing is known.
    """
    rows = []
    for source, attributes in content['associations'].items():
        for attribute, association in attributes.items():
            if association.get('mi') is None:
                continue
            of_source = f'{attribute.replace("_coco", " (COCO)")} of the {_things(source, run)}'
            rows.append((of_source, None, association, _controls(association, None)))
            for given, found in (association.get('given') or {}).items():
                name = f'given the {given}'
                rows.append((name, given, found, _controls(association, given)))
    if not rows:
        return None
    title = f'{layer}: what the choice of the expert depends on'
    figure = _titled(title, PAGE_WIDTH, 1.6 + 0.2 * len(rows))
    axes = figure.add_subplot()
    places = np.arange(len(rows))

    def column(key: str) -> np.ndarray:
        return np.array([a.get(key) for *_, a, _ in rows], float)

    conditional = np.array([given is not None for _, given, *_ in rows])
    mi = column('mi')
    axes.barh(places, column('mi_max'), 0.62, color='0.93', label='largest value possible')
    axes.barh(places[~conditional], mi[~conditional], 0.62, color='0.4', label='by itself')
    if conditional.any():
        axes.barh(
            places[conditional], mi[conditional], 0.62, color='0.7', edgecolor='0.4',
            linewidth=0.5, hatch='////', label='given level or class',
        )  # fmt: skip
    ends = np.array([a.get('interval') or (math.nan, math.nan) for *_, a, _ in rows], float)
    axes.hlines(places, *ends.T, color='black', linewidth=1.4, label='95 % interval, without bias')
    axes.plot(
        column('chance'), places, '|', color='black', markersize=9, markeredgewidth=1.6,
        label='by chance (mean of the flips)',
    )  # fmt: skip
    for name, (label, marker) in _CONTROLS.items():
        values = np.array([controls.get(name) for *_, controls in rows], float)
        if not np.isnan(values).all():
            axes.plot(
                values, places, marker, color='0.55', markeredgecolor='white', markersize=6,
                label=label, clip_on=False,
            )  # fmt: skip
    for place, (_, given, association, _) in zip(places, rows, strict=True):
        text = 'not tested'
        if association.get('left_out') != 1:
            text = f'{association["mi"]:.3f} nats, {_p_value(association)}'
        _beside(axes, place, text, 4, color='black' if given is None else '0.35')
    names = [f'    {name}' if given else name for name, given, *_ in rows]
    axes.set_yticks(places, [_shortened(name, 40) for name in names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel('mutual information with the expert (nats)')
    figure.legend(loc='outside lower center', ncols=3)
    return figure


def _controls(association: dict, given: str | None) -> dict[str, float | None]:
    controls = association.get('controls') or {}
    if given is None:
        return {name: control.get('mi') for name, control in controls.items()}
    return {name: (control.get('given') or {}).get(given) for name, control in controls.items()}


def _numbers(association: dict) -> np.ndarray:
    """(B,), how many things each bin holds, with those of experts that are not shown."""
    return np.asarray(association.get('totals', np.sum(association['counts'], axis=1)))


def _faded(association: dict) -> np.ndarray:
    """bool (B, E), cells in which nothing but chance is seen; none where that is not known."""
    shape = np.shape(association['counts'])
    p = association.get('cell_p')
    return np.zeros(shape, bool) if p is None else np.array(p) > SIGNIFICANT_CELL


def _history(layer: str, history: dict) -> Figure:
    figure = _titled(f'{layer}: use of the experts over the training', PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ('load', 'importance'), strict=True):
        plot_over_training(axes, history['step'], history[name], name)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower center', ncols=5)
    return figure


def _interventions(layer: str, entries: list[dict], unchanged: dict) -> Figure | None:
    """Change of each metric; None if the unchanged model has none."""
    metrics = [
        name
        for name, value in unchanged.items()
        if isinstance(value, int | float) and name not in ('AP50', 'AP75')
    ]
    if not metrics:
        return None
    where = 'all layers' if layer == 'all' else layer
    width = PAGE_WIDTH if len(metrics) > 1 else 4.6
    title = f'{where}: what changes when the experts are changed'
    zeroed = sum(entry['kind'] == 'zeroed' for entry in entries)
    entries = shown_interventions(entries, metrics[0])
    if (shown := sum(entry['kind'] == 'zeroed' for entry in entries)) < zeroed:
        title += f'\nof the {zeroed} experts that were zeroed, the {shown} that cost most'
    figure = _titled(title, width, 1.3 + 0.2 * len(entries))
    panels = figure.subplots(1, len(metrics), sharex=True, sharey=True, squeeze=False)[0]
    figure.get_layout_engine().set(wspace=0.1)  # or numbers seem to belong to the next panel
    places = np.arange(len(entries))
    names = {
        'only': 'expert {} alone',
        'without': 'without expert {}',
        'equal': 'all experts alike',
        'random': 'experts at random',
        'zeroed': 'expert {} zeroed',
    }
    for axes, metric in zip(panels, metrics, strict=True):
        changes = [
            math.nan if value is None else 100 * (value - unchanged[metric])
            for value in ((entry['metrics'] or {}).get(metric) for entry in entries)
        ]
        axes.axvline(0, color='black', linewidth=0.7)
        ends = [
            ((entry.get('difference') or {}).get(metric) or {}).get('interval')
            or (math.nan, math.nan)
            for entry in entries
        ]
        axes.barh(places, changes, 0.62, color='0.6')
        axes.hlines(places, *(100 * np.array(ends, float).T), color='black', linewidth=1.2)
        for place, change in zip(places, changes, strict=True):
            _beside(axes, place, _signed(change), 4)
        axes.set_title(f'{metric}\n(unchanged {100 * unchanged[metric]:.1f} %)')
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.spines['left'].set_visible(False)
        axes.tick_params(axis='y', length=0)
        axes.grid(axis='y', color='0.9', linewidth=0.5)
        axes.set_axisbelow(True)
    labels = [names.get(e['kind'], e['kind']).format(e['expert']) for e in entries]
    panels[0].set_yticks(places, labels)
    panels[0].set_ylim(len(entries) - 0.5, -0.5)
    figure.supxlabel('change in percentage points; lines: 95 % intervals', fontsize=8)
    return figure


def _polysemanticity(
    layer: str, content: dict, metrics: dict, drops: dict[int, np.ndarray]
) -> Figure:
    """The drop of every class with an expert zeroed, and how polysemantic the experts are."""
    found = content['polysemanticity']
    metric = 'accuracy' if 'accuracy' in metrics else 'AP'
    table = np.array(list(drops.values()))
    hit = np.flatnonzero(table.max(1) > 0)
    rows = hit[np.argsort(-table[hit].max(1), kind='stable')[:MAX_DRAWN]]
    # The classes that are hit most, in their own order; then experts along a diagonal.
    classes = np.flatnonzero(table[rows].max(0) > 0)
    classes = np.sort(
        classes[np.argsort(-table[rows][:, classes].max(0), kind='stable')][:MAX_DRAWN]
    )
    rows = rows[np.argsort(table[rows][:, classes].argmax(1), kind='stable')]
    title = (
        f'{layer}: classes that hang on single experts\ndrop of the {metric} of each class with an '
        f'expert zeroed; {found["num_mattering"]} of {found["num_zeroed"]} experts lower some class'
    )
    if len(rows) < len(hit):
        title += f', shown are the {len(rows)} that cost most'
    figure = _titled(title, PAGE_WIDTH, 2.2 + 0.125 * max(len(rows), 12))
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    names = list(metrics['per_class'])
    ids = list(drops)
    stride = math.ceil(len(classes) / 40)
    shown = table[np.ix_(rows, classes)]
    mesh = plot_heat_map(
        left, 100 * shown, [str(ids[row]) for row in rows],
        [_shortened(str(names[c]), 16) if i % stride == 0 else '' for i, c in enumerate(classes)],
        100 * shown.max(), None,
    )  # fmt: skip
    left.tick_params(labelsize=6)
    left.tick_params(axis='x', rotation=90)
    left.set_ylabel('expert')
    figure.colorbar(mesh, ax=left, pad=0.01, aspect=30).set_label('drop in percentage points')
    values = [value for value in found['values'] if value is not None]
    right.hist(values, bins=min(20, max(5, len(values) // 3)), color='0.45', edgecolor='white')
    right.axvline(found['mean'], color='black', linewidth=1, linestyle='--')
    right.set_title(f'mean {found["mean"]:.2f}')
    right.set_xlim(left=0)
    right.set_xlabel('polysemanticity\n(0: one class alone)')
    right.set_ylabel('experts')
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=2))
    return figure


def draw_polysemanticity(runs: Sequence[dict]) -> Figure | None:
    """Class-level polysemanticity against the number of experts, sparse and μMoE layers apart.

    Args:
        runs: Contents of ``experts.json``; every layer with single experts zeroed is a point.

    Returns:
        The figure, to be drawn within :func:`mmdet_moe.drawing.style`; None without any point.
    """
    series: dict[str, list[tuple[int, float, int]]] = {}
    for run in runs:
        for layer in run['layers'].values():
            found = layer.get('polysemanticity') or {}
            if found.get('mean') is not None:
                point = (layer['num_experts'], found['mean'], found['num_mattering'])
                series.setdefault(layer['kind'], []).append(point)
    if not series:
        return None
    figure = _titled('class-level polysemanticity by the number of experts', 4.6, 3.2)
    axes = figure.add_subplot()
    looks = {'sparse': ('sparse MoE', 's', '0.6'), 'factorised': ('μMoE', 'o', 'black')}
    for kind, (label, marker, colour) in looks.items():
        points = np.array(sorted(series.get(kind, [])), float).reshape(-1, 3)
        if not len(points):
            continue
        axes.plot(points[:, 0], points[:, 1], marker, color=colour, label=label, clip_on=False)
        counts = np.unique(points[:, 0])
        means = [points[points[:, 0] == count, 1].mean() for count in counts]
        axes.plot(counts, means, color=colour, linewidth=0.8)  # through the mean of each number
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f'{x:g}')
    axes.set_ylim(bottom=0)
    axes.set_xlabel('number of experts')
    axes.set_ylabel('polysemanticity\n(mean of the experts that lower some class)')
    figure.legend(loc='outside lower center', ncols=2)
    return figure


# Words -------------------------------------------------------------------------------------------


def _beside(axes: Axes, y: float, text: str, points: float, **look: Any) -> None:
    """Text to the right of the axes, so many points away."""
    axes.annotate(
        text, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(points, 0),
        textcoords='offset points', va='center', **{'fontsize': 7, **look},
    )  # fmt: skip


def _titled(title: str, width: float, height: float) -> Figure:
    figure = new_figure(width, height)
    figure.suptitle(wrapped(title, width))
    return figure


def _title(figure: Figure, title: str, association: dict) -> None:
    """The title, and below it how much there is to see."""
    parts = []
    if association.get('mi') is not None:
        limits = [
            # No line ends between the words and their number.
            f'{text} {association[key]:.{digits}f}'.replace(' ', '\u00a0')
            for key, text, digits in [('mi_max', 'at most', 2), ('chance', 'by chance', 3)]
            if association.get(key) is not None
        ]
        parts.append(
            f'mutual information {association["mi"]:.3f} nats'
            + (f' ({", ".join(limits)})' if limits else '')
        )
    parts.append(_p_value(association))
    if association.get('num_units') is not None:
        parts.append(f'{_number(association["num_units"])} decisions')
    title = _noted(title, association)
    figure.suptitle(wrapped(f'{title}\n{", ".join(parts)}', figure.get_figwidth()))


def _noted(title: str, content: dict) -> str:
    """A title that says how many experts a picture shows, where they are not all."""
    return f'{title}\n{content["left_out"]}' if content.get('left_out') else title


def _ids(content: dict, experts: int) -> Sequence[int]:
    """The numbers of the experts at the places of a layer or an association."""
    return content.get('experts') or range(experts)


def _ticks(content: dict, experts: int, most: int = 16) -> list[str]:
    """The numbers of the experts; where there are many, most are empty."""
    pairs = zip(_ids(content, experts), expert_ticks(experts, most), strict=True)
    return [str(e) if tick else '' for e, tick in pairs]


def _p_value(association: dict) -> str:
    p = association.get('p_adjusted', association.get('p_value'))
    return 'p unknown' if p is None else f'p = {p:.3f}' if p >= 0.0005 else 'p < 0.001'


def _things(source: str, run: dict) -> str:
    return 'images' if source == 'objects' and run['task'] == 'classification' else source


def _signed(change: float) -> str:
    if math.isnan(change):
        return 'n/a'
    # The sum makes a positive zero of a negative one.
    return f'{round(change, 1) + 0.0:+.1f}'.replace('-', '−')


def _number(value: float) -> str:
    # Shares of objects add up to whole ones only in total.
    return f'{value:,.0f}'


def _shortened(text: str, most: int) -> str:
    if '\n' in text or len(text) <= most:
        return text
    return textwrap.shorten(text[: most - 1], most, placeholder='') + '…'


# What each control is called, and its mark.
_CONTROLS = {
    'random': ('routers with random weights', 'D'),
    'level': ('knows the level alone', '^'),
}
_FIGURES: dict[str, dict[str, Callable[[str, str, dict], Figure]]] = {
    'size': {'size_given_expert': _size_given_expert, 'expert_given_size': _expert_given_size},
    'size_coco': {'size_coco': _in_order('{} of which size (COCO: 32 and 96 px)')},
    'class': {'class': _class},
    'superclass': {'superclass': _in_order('which super-class of the {}')},
    'cluster': {'cluster': _in_order('the {} of which hidden cluster')},
    'dataset': {'dataset': _in_order('the {} of which data set')},
    'level': {'level': _level},
    'position': {'position': _position},
}
# Every file that an analysis draws, those with the looks (report/pictures.py) as well.
_ALONE = (
    *('usage', 'information', 'coactivation', 'similarity', 'similarity_training', 'history'),
    *('interventions', 'polysemanticity', 'counterfactual', 'confusion'),
)
_BY_SOURCE = '|'.join(name for figures in _FIGURES.values() for name in figures)
_DRAWN = re.compile(
    rf'({"|".join(_ALONE)}|(decisions|objects|detections)_({_BY_SOURCE}))\.({"|".join(_SUFFIXES)})'
    r'|(routing|cam)_\d{6,}\.png'
)
