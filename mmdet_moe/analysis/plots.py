"""The figure of the README. Readable in greyscale; PNG or PDF by the suffix of the path."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdet_moe.drawing import level_names, plot_heat_map


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
