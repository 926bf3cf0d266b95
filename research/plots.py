"""The figures of the README and of docs/results.md. Readable in greyscale; PNG or PDF."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdet_moe.analysis.report.figures import px_axis, stack_shares
from mmdet_moe.drawing import expert_ticks, level_names, new_figure, plot_heat_map, style


def plot_overview(images: Sequence[np.ndarray], layers: dict[str, dict], path: Path) -> None:
    """Images with their detections, and below which expert works on which pyramid level.

    Args:
        images: ``(H, W, 3)`` uint8 RGB, with the detections drawn in.
        layers: Reports of :class:`~mmdet_moe.moe.UtilizationReport` as dicts, by MoE layer, with at
            least ``level_shares``, ``mi_input`` and ``mi_level``.
        path: The file to write.
    """
    figure = Figure(figsize=(11, 6.4), layout='constrained')
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    columns = upper.subplots(1, len(images), squeeze=False)[0]
    for axes, image in zip(columns, images, strict=True):
        axes.imshow(image)
        axes.set_axis_off()
    panels = lower.subplots(1, len(layers), squeeze=False)[0]
    for axes, (name, report) in zip(panels, layers.items(), strict=True):
        _plot_level_shares(axes, name, report)
    with matplotlib.rc_context({'savefig.dpi': 110, 'pdf.fonttype': 42}):
        figure.savefig(path)


def _plot_level_shares(axes: Axes, name: str, report: dict) -> None:
    shares = np.array(report['level_shares'])
    levels, experts = shares.shape
    plot_heat_map(axes, shares, level_names(levels), [f'expert {e}' for e in range(experts)])
    axes.set_ylabel('pyramid level')
    axes.set_title(
        f'{name}: share of the decisions of a level\ninformation on the input '
        f'{report["mi_input"]:.2f} nats, on the level {report["mi_level"]:.2f}',
        fontsize=10,
    )


def plot_specialisation(runs: dict[str, dict], path: Path) -> None:
    """Which expert sees which size, one row for each run and one column for each MoE layer.

    Args:
        runs: Contents of ``experts.json`` by the name of the run, with the same layers, of at most
            :data:`~mmdet_moe.drawing.MAX_STYLES` experts.
        path: The file to write.
    """
    layers = list(next(iter(runs.values()))['layers'])
    with style():
        figure = new_figure(7.2, 0.9 + 1.45 * len(runs))
        grid = figure.subplots(len(runs), len(layers), sharex=True, sharey=True, squeeze=False)
        for row, (name, experts) in zip(grid, runs.items(), strict=True):
            for axes, layer in zip(row, layers, strict=True):
                found = experts['layers'][layer]['associations']['objects']['size']
                edges = np.array(found['edges'])
                stack_shares(axes, np.array(found['expert_given_bin']), edges)
                px_axis(axes, edges, 3, on_dark=True)
                axes.set_ylim(0, 1)
                axes.set_title(f'{layer}: {found["mi"]:.2f} nats', fontsize=8.5)
            name = textwrap.fill(name, 26)
            row[0].set_ylabel(f'{name}\n\nshare of the objects', fontsize=8.5)
        for axes in grid[-1]:
            axes.set_xlabel('√area of the objects (px)')
        handles = grid[0, 0].get_legend_handles_labels()[0][::-1]
        figure.legend(handles=handles, loc='outside right center', handleheight=1.4)
        figure.savefig(path, dpi=130)


def plot_class_specialisation(runs: dict[str, dict], path: Path, attribute: str = 'class') -> None:
    """How the images of each class are divided among the experts, one panel for each run.

    Args:
        runs: Contents of ``experts.json`` of classifiers by the name of the run.
        path: The file to write.
        attribute: ``'class'``, or ``'superclass'`` of data that know it.
    """
    found = {}
    for name, experts in runs.items():
        (layer,) = experts['layers'].values()
        found[name] = layer['associations']['objects'][attribute]
    bins = max(len(entry['bins']) for entry in found.values())
    with style():
        figure = new_figure(max(7.2, 1.4 + 1.1 * len(runs)), max(3.4, 0.9 + 0.2 * bins))
        panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for axes, (name, entry) in zip(panels, found.items(), strict=True):
            shares = np.array(entry['expert_given_bin'])
            names = [str(label).replace('_', ' ') for label in entry['bins']]
            plot_heat_map(axes, shares, names, expert_ticks(shares.shape[1]), fontsize=6)
            axes.set_title(f'{name}\n{entry["mi"]:.2f} nats', fontsize=8.5)
            axes.set_xlabel('expert')
        panels[0].set_ylabel({'class': 'class', 'superclass': 'super-class'}[attribute])
        figure.savefig(path, dpi=130)
