"""Figures. Readable in greyscale; written as PNG or PDF by the suffix of the path."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def plot_level_shares(layers: dict[str, dict], path: Path) -> None:
    """Which expert works on which pyramid level: one heat map for each MoE layer.

    Args:
        layers: Reports of :class:`~mmdet_moe.moe.UtilizationReport` as dicts, by layer, with at
            least ``level_shares``, ``mi_input`` and ``mi_level``.
        path: The file to write.
    """
    figure = Figure(figsize=(3.6 * len(layers), 3.4), layout='constrained')
    for axes, (name, report) in zip(
        figure.subplots(1, len(layers), squeeze=False)[0], layers.items(), strict=True
    ):
        shares = report['level_shares']
        axes.imshow(shares, cmap='Greys', vmin=0, vmax=1, aspect='auto')
        for level, row in enumerate(shares):
            for expert, share in enumerate(row):
                axes.text(
                    expert, level, f'{share:.2f}', ha='center', va='center',
                    color='white' if share > 0.5 else 'black',
                )  # fmt: skip
        axes.set_xticks(range(len(shares[0])), [f'E{e}' for e in range(len(shares[0]))])
        axes.set_yticks(range(len(shares)), [f'level {i}' for i in range(len(shares))])
        axes.set_xlabel('expert')
        axes.set_title(
            f'{name}\ninformation on input {report["mi_input"]:.2f} nats, '
            f'on level {report["mi_level"]:.2f}',
            fontsize=9,
        )
    with matplotlib.rc_context({'savefig.dpi': 150}):
        figure.savefig(path)
