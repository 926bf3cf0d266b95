"""The figures of the cluster mixtures (arXiv 2208.02813), from plain arrays; PNG or PDF.

Clusters differ by brightness and by marker, so that they are told apart in greyscale as well.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mmdet_moe.analysis.files import write_file
from mmdet_moe.drawing import (
    PAGE_WIDTH,
    expert_colour,
    expert_styles,
    new_figure,
    style,
    to_bytes,
)

_MARKED = 5  # markers on a line


def plot_alignment(record: Mapping[str, np.ndarray], path: Path) -> None:
    """What every expert's filters and the router's weights turn to over a training.

    One column for each expert, the experts with the largest load at the end first: above the
    filters, below the router. Solid lines are inner products with the clusters' features, dashed
    ones those with their centres.

    Args:
        record: As ``ClusterAlignmentHook`` writes it: ``steps`` (S,), ``load`` (S, E) and
            ``expert_features``, ``expert_centres``, ``router_features``, ``router_centres``, each
            (S, E, K).
        path: The file to write.
    """
    steps, load = record['steps'], np.nan_to_num(record['load'][-1])
    experts, clusters = record['expert_features'].shape[1:]
    looks = expert_styles(clusters)
    with style():
        figure = new_figure(PAGE_WIDTH, 3.6)
        rows = figure.subplots(2, experts, sharex=True, sharey='row', squeeze=False)
        for column, e in enumerate(np.argsort(-load, kind='stable')):
            for axes, part in zip(rows[:, column], ('expert', 'router'), strict=True):
                for kind, line in (('features', '-'), ('centres', '--')):
                    for k, look in enumerate(looks):
                        axes.plot(
                            steps,
                            record[f'{part}_{kind}'][:, e, k],
                            line,
                            color=look.colour,
                            marker=look.marker if line == '-' else None,
                            markersize=2.8,
                            markevery=max(1, math.ceil(len(steps) / _MARKED)),
                            linewidth=0.9,
                        )
                axes.axhline(0, color='0.7', linewidth=0.5, zorder=0)
                axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
            rows[0, column].set_title(f'expert {e}\nload {load[e]:.2f}')
        rows[0, 0].set_ylabel('filters: largest\n|inner product|')
        rows[1, 0].set_ylabel('router:\ninner product')
        figure.supxlabel('training iteration', fontsize=8)
        handles = [
            Line2D(
                [], [], color=look.colour, marker=look.marker, markersize=3, label=f'cluster {k}'
            )
            for k, look in enumerate(looks)
        ]
        for line, name in (('-', 'feature'), ('--', 'centre')):
            handles.append(Line2D([], [], color='black', linestyle=line, label=f'with its {name}'))
        figure.legend(handles=handles, loc='outside upper center', ncols=len(handles))
        _save(figure, path)


def plot_routing_plane(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    path: Path,
    max_points: int = 1500,
) -> None:
    """Which expert each sample goes to, on a plane on which the clusters lie apart.

    A cluster's samples are drawn on a ray of its own, as far out as their centre is strong; markers
    tell the experts by their shape and their colour.

    Args:
        panels: By title ``(strengths, clusters, experts)`` of N samples: (N, K) inner products
            with the centres, int (N,) and int (N,).
        path: The file to write.
        max_points: Samples drawn in a panel, the first ones.
    """
    with style():
        figure = new_figure(PAGE_WIDTH, 0.6 + PAGE_WIDTH / max(len(panels), 2))
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        used: set[int] = set()
        for axes, (title, (strengths, clusters, experts)) in zip(
            columns, panels.items(), strict=True
        ):
            used |= set(experts[:max_points].tolist())
            _plot_plane(axes, strengths[:max_points], clusters, experts[:max_points])
            axes.set_title(title)
        handles = [
            Line2D([], [], linestyle='', label=f'expert {e}', **_expert_marker(e))
            for e in sorted(used)
        ]
        figure.legend(handles=handles, loc='outside lower center', ncols=min(8, len(handles)))
        _save(figure, path)


def _plot_plane(
    axes: Axes, strengths: np.ndarray, clusters: np.ndarray, experts: np.ndarray
) -> None:
    count = strengths.shape[1]
    angles = 2 * np.pi * (np.arange(count) + 0.5) / count
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = strengths @ directions
    for e in np.unique(experts):
        x, y = points[experts == e].T
        axes.plot(x, y, linestyle='', alpha=0.75, **_expert_marker(int(e)))
    outermost = np.abs(points).max()
    for k, direction in enumerate(directions):
        x, y = 1.1 * outermost * direction / np.abs(direction).max()
        axes.text(x, y, f'cluster {k}', ha='center', va='center')
    axes.set_aspect('equal')
    limit = 1.2 * outermost
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _expert_marker(expert: int) -> dict:
    look = expert_styles(8)[expert % 8]
    return {
        'marker': look.marker,
        'markersize': 3,
        'markerfacecolor': expert_colour(expert),
        'markeredgecolor': 'black',
        'markeredgewidth': 0.25,
    }


def plot_dispatch_entropy(
    runs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], path: Path, num_clusters: int
) -> None:
    """The dispatch entropy over the training, one thin line for each run and their mean.

    A run that ended earlier counts with its last value.

    Args:
        runs: By name, for each run its steps (S,), ascending, and the entropy at them (S,) in nats;
            NaN is left out.
        path: The file to write.
        num_clusters: K: ``log K`` is drawn, the entropy of equally large clusters.
    """
    with style():
        figure = new_figure(0.6 * PAGE_WIDTH, 2.6)
        axes = figure.subplots()
        looks = expert_styles(max(2, len(runs)))
        for look, (name, lines) in zip(looks, runs.items(), strict=False):
            known = [(s[~np.isnan(h)], h[~np.isnan(h)]) for s, h in lines]
            for steps, entropy in known:
                axes.plot(steps, entropy, color=look.colour, linewidth=0.4, alpha=0.5)
            every = np.unique(np.concatenate([steps for steps, _ in known]))
            mean = np.mean([np.interp(every, *line) for line in known], axis=0)
            axes.plot(
                every,
                mean,
                color=look.colour,
                marker=look.marker,
                markersize=3.2,
                markevery=max(1, len(every) // 8),
                label=f'{name}, mean of {len(lines)}',
            )
        axes.axhline(math.log(num_clusters), color='0.5', linewidth=0.8, zorder=0)
        axes.annotate(f'log {num_clusters}', (0, math.log(num_clusters)), va='bottom', fontsize=7)
        axes.set(xlabel='training iteration', ylabel='dispatch entropy (nats)')
        axes.set_ylim(0, 1.12 * math.log(num_clusters))
        axes.legend()
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_file(path, to_bytes(figure, path.suffix[1:]))
