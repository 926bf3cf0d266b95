"""What all pictures share: style, heat maps, and the use of the experts over a training.

Readable in greyscale: experts differ by brightness, and by hatch or line style and marker as well.
Only Matplotlib's objects are used, never ``pyplot``, whose global state belongs to the user.
"""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Up to here experts are told apart by hatches and line styles; more are drawn as heat maps.
MAX_STYLES = 8
#: Width of a page's text in inches.
PAGE_WIDTH = 7.2

_STYLE = {
    'font.family': 'DejaVu Sans',  # comes with Matplotlib
    'font.size': 8,
    'figure.titlesize': 8.5,
    'axes.titlesize': 8,
    'axes.labelsize': 8,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'legend.fontsize': 7,
    'legend.frameon': False,
    'axes.linewidth': 0.6,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'lines.linewidth': 1.1,
    'hatch.linewidth': 0.5,
    'savefig.dpi': 200,
    'pdf.fonttype': 42,  # TrueType: publishers refuse Type 3
    # The names of layers and classes may contain dollar signs and underscores.
    'text.parse_math': False,
    'text.usetex': False,
}
_BREAK = '\u200b'  # a zero-width space: where a line may be broken
# Okabe and Ito's colours, and shades towards black (below 0) or white of them.
_HUES = (
    '#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7', '#7A7A7A',
)  # fmt: skip
_SHADES = (0.0, -0.4, 0.5, -0.6, 0.7, -0.2, 0.3, -0.75)
_HATCHES = ('', '////', '....', '\\\\\\\\', 'xxxx', '----', 'oo', '++')
_LINES = ('-', '--', '-.', ':')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')


@dataclass(frozen=True)
class ExpertStyle:
    """How one expert is told from the others.

    Attributes:
        colour: RGB, the brighter the higher the number of the expert.
        contrast: What is seen on top of ``colour``: black or white.
        hatch: Matplotlib's hatch pattern.
        line: Matplotlib's line style.
        marker: Matplotlib's marker.
    """

    colour: tuple[float, float, float]
    contrast: str
    hatch: str
    line: str
    marker: str


def style() -> AbstractContextManager[None]:
    """Context within which figures are drawn and saved."""
    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with constrained layout; sizes in inches."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def to_rgb(figure: Figure, dpi: int = 110) -> np.ndarray:
    """Render a figure.

    Returns:
        uint8 RGB, shape (H, W, 3).
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def to_bytes(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a file.

    Args:
        figure: Drawn within :func:`style`.
        suffix: ``'png'`` or ``'pdf'``.
    """
    buffer = io.BytesIO()
    # Equal figures are equal files.
    metadata = {'CreationDate': None} if suffix == 'pdf' else {'Software': None}
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()


def expert_styles(num_experts: int) -> list[ExpertStyle]:
    """One style for each of the experts; all different up to :data:`MAX_STYLES`."""
    colours = matplotlib.colormaps['cividis'](np.linspace(0.0, 0.82, num_experts))
    return [
        ExpertStyle(
            colour=tuple(float(x) for x in colour[:3]),
            contrast='white' if e < 0.5 * num_experts else 'black',
            hatch=_HATCHES[e % len(_HATCHES)],
            line=_LINES[e % len(_LINES)],
            marker=_MARKERS[e % len(_MARKERS)],
        )
        for e, colour in enumerate(colours)
    ]


def expert_colour(expert: int) -> str:
    """The colour of an expert on an image or in the report: ``'#rrggbb'``.

    Colour-blind readers can tell the first eight apart; later experts have darker and lighter
    shades of the same hues, from the 65th on once more. Its number has to stand beside a colour.
    """
    hue = _HUES[expert % len(_HUES)]
    shade = _SHADES[expert // len(_HUES) % len(_SHADES)]
    towards = 0 if shade < 0 else 255
    channels = [int(hue[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [math.floor(c + (towards - c) * abs(shade) + 0.5) for c in channels]
    return '#' + ''.join(f'{c:02x}' for c in mixed)


def expert_colours() -> list[str]:
    """All different ones of :func:`expert_colour`."""
    return [expert_colour(e) for e in range(len(_HUES) * len(_SHADES))]


def text_on(colour: str) -> str:
    """``'black'`` or ``'white'``, whichever stands out more (WCAG's relative luminance).

    Args:
        colour: ``'#rrggbb'``.
    """
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 'black' if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else 'white'


def level_names(num_levels: int) -> list[str]:
    """Labels of pyramid levels."""
    names = [str(level) for level in range(num_levels)]
    if num_levels > 1:
        names[0] += '\nfine'
        names[-1] += '\ncoarse'
    return names


def darkest(experts: int) -> float:
    """The share, of so many experts, that a heat map draws black, or more: the same for all runs.

    Eight times the fair share of 1 / E, which no heat map draws darker than light grey, or all.
    """
    return min(1.0, 8 / experts)


def plot_heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    vmax: float = 1.0,
    numbers: str | None = '.2f',
    fontsize: float | None = None,
    faded: np.ndarray | None = None,
) -> QuadMesh:
    """Values from white (0) to black (``vmax``), as cells of a table.

    Args:
        axes: Where to draw.
        values: Shape (R, C), at least 0.
        rows: R labels; the first row is on top.
        columns: C labels; one that is empty gets no tick.
        vmax: The value that is black.
        numbers: Format of the number in each cell; None for no numbers.
        fontsize: Of the numbers, in points.
        faded: bool (R, C), cells that are not to be read, drawn pale. Default: none.
    """
    faded = np.zeros(np.shape(values), bool) if faded is None else faded
    values = np.asarray(values, dtype=float)
    vmax = vmax if vmax > 0 else 1.0
    # Cells and not pixels: sharp in a PDF at any zoom.
    mesh = axes.pcolormesh(
        np.arange(values.shape[1] + 1) - 0.5,
        np.arange(values.shape[0] + 1) - 0.5,
        values,
        cmap='Greys',
        vmin=0,
        vmax=vmax,
        edgecolors='0.8',
        linewidth=0.3 if values.shape[1] <= 32 else 0,
    )
    if faded.any():
        mesh.set_alpha(np.where(faded, 0.25, 1.0))
    if numbers is not None:
        for (row, column), value in np.ndenumerate(values):
            # From here on white stands out more than black (WCAG's contrast on `Greys`).
            is_dark = value > 0.62 * vmax and not faded[row, column]
            colour = 'white' if is_dark else '0.55' if faded[row, column] else 'black'
            axes.text(
                column,
                row,
                format(value, numbers),
                ha='center',
                va='center',
                color=colour,
                fontsize=fontsize,
            )
    shown = [i for i, name in enumerate(columns) if name]
    axes.set_xticks(shown, [columns[i] for i in shown])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    return mesh


def plot_over_training(
    axes: Axes, steps: Sequence[int], shares: Sequence[Sequence[float]], ylabel: str
) -> None:
    """The share of every expert over the iterations, and the fair share 1 / E.

    Args:
        axes: Where to draw. Up to :data:`MAX_STYLES` experts are lines, more are a heat map.
        steps: S training iterations, ascending.
        shares: Shape (S, E), in 0..1.
        ylabel: What is shared.
    """
    values = np.asarray(shares, dtype=float)
    experts = values.shape[1]
    axes.set_xlabel('training iteration')
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if experts <= MAX_STYLES:
        for e, look in enumerate(expert_styles(experts)):
            axes.plot(
                steps,
                values[:, e],
                color=look.colour,
                linestyle=look.line,
                marker=look.marker,
                markersize=3.2,
                markevery=max(1, math.ceil(len(steps) / 8)),
                label=f'expert {e}',
            )
        axes.axhline(1 / experts, color='0.5', linewidth=0.8, zorder=0, label='fair share')
        axes.set_ylim(0, max(1.08 * float(values.max()), 1.5 / experts))
        axes.set_ylabel(f'share of the {ylabel}')
        return
    mesh = axes.pcolormesh(
        _borders(steps),
        np.arange(experts + 1) - 0.5,
        values.T,
        cmap='Greys',
        vmin=0,
        vmax=float(values.max()) or 1.0,
        rasterized=True,
    )
    axes.set_ylim(experts - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel('expert')
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label(f'share of the {ylabel}')


def draw_utilization(
    layer: str,
    level_shares: Sequence[Sequence[float]],
    steps: Sequence[int] = (),
    load: Sequence[Sequence[float]] = (),
    importance: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """One picture of how a layer uses its experts, for a visualisation backend.

    Args:
        layer: Name of the MoE layer.
        level_shares: For each pyramid level, the share of its decisions by expert, (L, E).
        steps: S training iterations; where it is empty only the levels are drawn.
        load: Share of the routed rows by expert, (S, E).
        importance: Share of the importance by expert, (S, E).

    Returns:
        uint8 RGB, shape (H, W, 3).
    """
    levels, experts = np.shape(level_shares)
    with style():
        figure = new_figure(9 if len(steps) else 4.5, 3.6 + 0.12 * max(0, levels - 5))
        figure.suptitle(wrapped(f'{layer}: use of the {experts} experts', figure.get_figwidth()))
        axes = figure.subplots(1, 1 + 2 * bool(len(steps)), squeeze=False)[0]
        few = experts <= MAX_STYLES
        mesh = plot_heat_map(
            axes[0],
            level_shares,
            level_names(levels),
            expert_ticks(experts, most=8),
            vmax=darkest(experts),
            numbers='.2f' if few else None,
            fontsize=7,
        )
        if not few:
            figure.colorbar(mesh, ax=axes[0], pad=0.01)
        axes[0].set_xlabel('expert')
        axes[0].set_ylabel('pyramid level')
        axes[0].set_title('share of the decisions of a level')
        for panel, values, name in zip(
            axes[1:], (load, importance), ('load', 'importance'), strict=False
        ):
            plot_over_training(panel, steps, values, name)
            panel.set_title(f'{name} over the training')
        if len(steps) and few:
            handles, labels = axes[1].get_legend_handles_labels()
            figure.legend(handles, labels, loc='outside lower center', ncols=min(9, len(labels)))
        return to_rgb(figure)


def expert_ticks(num_experts: int, most: int = 16) -> list[str]:
    """Numbers of the experts; where there are many, most are empty."""
    stride = max(1, 2 ** math.ceil(math.log2(num_experts / most)))
    return [str(e) if e % stride == 0 else '' for e in range(num_experts)]


def wrapped(text: str, width: float, fontsize: float = 8.5) -> str:
    """Break lines that are longer than ``width`` inches into lines of about equal length.

    The names of modules, which can be long, are broken after a dot.
    """
    # A letter is 0.57 of the font size wide, which is in points of 1/72 inch.
    most = max(8, int(width * 72 / (0.57 * fontsize)))
    lines = []
    for whole in text.splitlines():
        line = re.sub(r'\.(?=[A-Za-z_])', f'.{_BREAK} ', whole) if len(whole) > most else whole
        for parts in range(max(1, math.ceil(len(line) / most)), len(line) + 2):
            even = min(most, math.ceil(len(line) / parts) + 8)
            broken = textwrap.wrap(line, max(even, 1), break_on_hyphens=False)
            if len(broken) <= parts:
                break
        lines += [part.replace(f'{_BREAK} ', '').replace(_BREAK, '') for part in broken] or ['']
    return '\n'.join(lines)


def _borders(steps: Sequence[int]) -> np.ndarray:
    """S + 1 borders of cells around S steps."""
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
