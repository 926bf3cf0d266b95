"""Pictures of single images: what was found by which expert, and the routing over the image.

An expert is a colour and, always, its number. Everything is laid out in pixels of the picture.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from mmdet_moe.drawing import expert_colour, style, text_on, wrapped

DPI = 100
#: The longer side of a picture's image in px: smaller images are enlarged, larger ones reduced.
SHORTEST, LONGEST = 960, 1600
UNKNOWN = -1
_UNKNOWN_COLOUR = '#7A7A7A'
_MARGIN = 14
_MIN_WIDTH = 560
_NUM_ENTRIES = 16  # experts in a legend
_SHRINK = (1.0, 0.75, 0.55)  # of the image, with one, two and more panels
_MAX_STEPS = 8  # how far a label is moved away from its box, in its own height
# The opacity of a cell for weights 0 and 1.
_FAINT, _STRONG = 0.1, 0.6
_LINE_HEIGHT = 1.4  # of the font size


@dataclass(frozen=True)
class Mark:
    """A box to draw.

    Attributes:
        box: x0, y0, x1, y1 in px of the image.
        text: What is said of it.
        expert: Whose colour it gets; :data:`UNKNOWN` for none.
    """

    box: tuple[float, float, float, float]
    text: str
    expert: int


@dataclass(frozen=True)
class RoutedMap:
    """The decisions of a layer for one map of one image.

    Attributes:
        name: Title of the panel; empty for none.
        x: (columns + 1,), the borders of the cells in px of the image, ascending.
        y: (rows + 1,).
        weights: (rows, columns, E).
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Heat:
    """Where one thing is seen.

    Attributes:
        name: Title of the panel.
        values: (rows, columns), at least 0.
        size: Width and height that they cover, px of the image; may reach beyond it.
        expert: Who sees it.
        box: x0, y0, x1, y1 of the thing, px of the image; None for the whole image.
    """

    name: str
    values: np.ndarray
    size: tuple[float, float]
    expert: int
    box: tuple[float, float, float, float] | None


@contextmanager
def page_style() -> Iterator[None]:
    """Context within which pictures are drawn and saved."""
    with style(), matplotlib.rc_context({'savefig.dpi': DPI}):
        yield


def colour_of(expert: int) -> str:
    """The colour of an expert, or that of :data:`UNKNOWN`."""
    return _UNKNOWN_COLOUR if expert == UNKNOWN else expert_colour(expert)


# Layout ------------------------------------------------------------------------------------------


class _Page:
    """A figure with a title, panels that show the same image, and a legend.

    Args:
        image: uint8 (H, W, 3), RGB.
        title: Lines.
        names: Of the panels.
        handles: Of the legend.
    """

    def __init__(
        self, image: np.ndarray, title: str, names: Sequence[str], handles: Sequence[Artist]
    ) -> None:
        height, width = image.shape[:2]
        self.size = (width, height)
        columns = _columns(len(names), width / height)
        rows = math.ceil(len(names) / columns)
        self.scale = _scale(max(width, height), _SHRINK[min(len(names), 3) - 1])
        shown = (max(1, round(width * self.scale)), max(1, round(height * self.scale)))
        self.font = min(22.0, max(13.0, 0.0125 * max(shown), 0.009 * columns * shown[0]))
        line = _LINE_HEIGHT * self.font
        inner = max(columns * shown[0] + (columns - 1) * _MARGIN, _MIN_WIDTH)
        page_width = inner + 2 * _MARGIN
        title = wrapped(title, inner / DPI, self.points())
        title_height = line * (title.count('\n') + 1)
        named = line if any(names) else 0.0
        legend_rows, legend_columns = _legend_grid(handles, inner, self.font)
        legend_height = 1.5 * line * legend_rows
        panel_height = named + shown[1] + _MARGIN
        page_height = round(2 * _MARGIN + title_height + rows * panel_height + legend_height)
        # A little more than whole pixels: what is rounded down stays.
        self.figure = Figure(
            figsize=((page_width + 1e-3) / DPI, (page_height + 1e-3) / DPI), dpi=DPI
        )
        self._canvas = FigureCanvasAgg(self.figure)
        self.figure.text(
            _MARGIN / page_width, 1 - _MARGIN / page_height, title, ha='left', va='top',
            fontsize=self.points(), linespacing=1.25,
        )  # fmt: skip
        self.panels = []
        used = columns * shown[0] + (columns - 1) * _MARGIN
        for i, name in enumerate(names):
            left = (page_width - used) // 2 + i % columns * (shown[0] + _MARGIN)
            top = round(_MARGIN * 1.5 + title_height + i // columns * panel_height + named)
            axes = self.figure.add_axes(
                (left / page_width, 1 - (top + shown[1]) / page_height,
                 shown[0] / page_width, shown[1] / page_height)
            )  # fmt: skip
            self._show(axes, image)
            if name:
                axes.set_title(name, fontsize=self.points(), pad=0.3 * self.points(), loc='left')
            self.panels.append(axes)
        # How far labels may reach beyond the image to its left and right, px of the picture.
        self.side = (page_width - shown[0]) / 2 - 2 if len(names) == 1 else 0.0
        if handles:
            self.figure.legend(
                handles=handles,
                loc='lower left',
                bbox_to_anchor=(_MARGIN / page_width, 0.4 * _MARGIN / page_height),
                ncols=legend_columns,
                fontsize=self.points(0.92),
                borderaxespad=0,
                borderpad=0,
                handlelength=1.3,
                handleheight=1.1,
                columnspacing=1.6,
            )

    def points(self, factor: float = 1.0) -> float:
        """A font size in points."""
        return factor * self.font * 72 / DPI

    def text_width(self, text: str, factor: float = 1.0) -> float:
        """How wide a line of text is, px of the picture."""
        properties = matplotlib.font_manager.FontProperties(
            family=matplotlib.rcParams['font.family'], size=self.points(factor)
        )
        renderer = self._canvas.get_renderer()
        return renderer.get_text_width_height_descent(text, properties, ismath=False)[0]

    def _show(self, axes: Axes, image: np.ndarray) -> None:
        width, height = self.size
        smooth = 'nearest' if self.scale > 12 else 'bicubic' if self.scale > 1 else 'antialiased'
        axes.imshow(
            image, extent=(0, width, height, 0), interpolation=smooth, aspect='auto', zorder=0
        )
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()


def _scale(longer_side: float, shrink: float) -> float:
    shortest, longest = SHORTEST * shrink, LONGEST * shrink
    return min(max(longer_side, shortest), longest) / longer_side


def _columns(panels: int, aspect: float) -> int:
    """So many that the panels together are about half as wide again as they are high."""
    return min(
        range(1, panels + 1),
        key=lambda c: abs(math.log(c * aspect / math.ceil(panels / c) / 1.5)),
    )


def _legend_grid(handles: Sequence[Artist], width: float, font: float) -> tuple[int, int]:
    if not handles:
        return 0, 1
    widths = [font * (0.58 * len(handle.get_label()) + 3.5) for handle in handles]
    columns = len(handles) if sum(widths) <= width else max(1, int(width / max(widths)))
    return math.ceil(len(handles) / columns), columns


def _handles(counts: dict[int, str], num_experts: int) -> list[Artist]:
    """One entry per expert: all of few experts, those that occur of many."""
    shown = range(num_experts) if num_experts <= _NUM_ENTRIES else list(counts)[:_NUM_ENTRIES]
    handles = [
        Patch(
            facecolor=colour_of(e),
            edgecolor='black',
            linewidth=0.6,
            label=f'expert {e}: {counts.get(e, "none")}',
        )
        for e in sorted(e for e in shown if e != UNKNOWN)
    ]
    left_out = len([e for e in counts if e != UNKNOWN and e not in shown])
    if left_out:
        handles.append(Patch(visible=False, label=f'and {left_out} more'))
    if UNKNOWN in counts:
        label = f'expert unknown: {counts[UNKNOWN]}'
        handles.append(Patch(facecolor=_UNKNOWN_COLOUR, edgecolor='black', label=label))
    return handles


# Marks -------------------------------------------------------------------------------------------


def draw_marks(
    image: np.ndarray, marks: Sequence[Mark], title: str, num_experts: int, things: str
) -> Figure:
    """Boxes with labels on an image, within :func:`page_style`.

    Args:
        image: uint8 (H, W, 3), RGB.
        marks: The boxes, the most important first.
        title: Lines above the image.
        num_experts: E.
        things: What the legend counts, in the plural.
    """
    experts = [mark.expert for mark in marks]
    counted = sorted({e: experts.count(e) for e in experts}.items(), key=lambda item: -item[1])
    counts = {e: f'{n} {things if n > 1 else things.removesuffix("s")}' for e, n in counted}
    page = _Page(image, title, [''], _handles(counts, num_experts))
    (axes,) = page.panels
    factor = 0.92 if len(marks) <= 20 else 0.8
    line = page.font * factor
    boxes = np.array([mark.box for mark in marks]).reshape(-1, 4) * page.scale
    labels = [(page.text_width(mark.text, factor) + 0.6 * line, 1.35 * line) for mark in marks]
    shown = np.array(page.size) * page.scale
    corners = place_labels(boxes, labels, (-page.side, 0, shown[0] + page.side, shown[1]))
    stroke = max(1.6, 0.11 * page.font)
    for mark, box in reversed(list(zip(marks, boxes / page.scale, strict=True))):
        axes.add_patch(
            Rectangle(
                box[:2], *(box[2:] - box[:2]), fill=False, edgecolor=colour_of(mark.expert),
                linewidth=stroke * 72 / DPI, joinstyle='miter', clip_on=False, zorder=2,
                path_effects=[withStroke(linewidth=(stroke + 1.6) * 72 / DPI, foreground='black')],
            )
        )  # fmt: skip
    for mark, box, (left, top), (width, height) in zip(marks, boxes, corners, labels, strict=True):
        colour = colour_of(mark.expert)
        line_x, line_y = _connection(box, (left, top, left + width, top + height))
        if math.hypot(line_x[1] - line_x[0], line_y[1] - line_y[0]) > 2:
            axes.plot(
                np.array(line_x) / page.scale, np.array(line_y) / page.scale, color=colour,
                linewidth=0.7 * stroke * 72 / DPI, clip_on=False, zorder=2.5,
                path_effects=[withStroke(linewidth=(stroke + 1) * 72 / DPI, foreground='black')],
            )  # fmt: skip
        left, top, width, height = (v / page.scale for v in (left, top, width, height))
        axes.add_patch(
            Rectangle(
                (left, top), width, height, facecolor=colour, edgecolor='black', linewidth=0.5,
                clip_on=False, zorder=3,
            )
        )  # fmt: skip
        axes.text(
            left + width / 2, top + height / 2, mark.text, color=text_on(colour), ha='center',
            va='center', fontsize=page.points(factor), clip_on=False, zorder=4,
        )  # fmt: skip
    return page.figure


def place_labels(
    boxes: np.ndarray,
    sizes: Sequence[tuple[float, float]],
    area: tuple[float, float, float, float],
) -> list[tuple[float, float]]:
    """Where labels hide least: other labels above all, then what is in the boxes.

    Args:
        boxes: (n, 4): x0, y0, x1, y1; the labels of the first ones choose first.
        sizes: n widths and heights of the labels.
        area: x0, y0, x1, y1 that no label leaves unless it is larger.

    Returns:
        Left and top of each.
    """
    placed = np.zeros((0, 4))
    for box, size in zip(boxes, sizes, strict=True):
        best = None
        for distance, corner in _candidates(box, size):
            moved = tuple(max(area[i], min(corner[i], area[i + 2] - size[i])) for i in (0, 1))
            rectangle = (*moved, moved[0] + size[0], moved[1] + size[1])
            cost = (
                10 * _overlap(rectangle, placed)
                + min(1.5, _overlap(rectangle, boxes))
                + distance
                + 0.1 * (abs(moved[0] - corner[0]) + abs(moved[1] - corner[1])) / size[1]
            )
            if best is None or cost < best[0]:
                best = cost, rectangle
        placed = np.concatenate([placed, [best[1]]])
    return [(left, top) for left, top, *_ in placed.tolist()]


def _candidates(
    box: np.ndarray, size: tuple[float, float]
) -> Iterator[tuple[float, tuple[float, float]]]:
    """Places for a label around its box, each with what speaks against it."""
    (x0, y0, x1, y1), (width, height) = box.tolist(), size
    touching = (
        (x0, y0 - height), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1), (x0, y0),
        (x1, y0), (x0 - width, y0), (x0, y1 - height), (x1, y1 - height),
    )  # fmt: skip
    for order, corner in enumerate(touching):
        yield 0.02 * order, corner
    for step in range(1, _MAX_STEPS + 1):
        away = step * 1.15 * height
        for left in (x0, x1 - width, x0 - width, x1):
            for top in (y0 - height - away, y1 + away):
                yield 0.3 + 0.15 * step, (left, top)
        for left in (x0 - width - height, x1 + height):
            for top in (y0 - away, y0 + away):
                yield 0.3 + 0.15 * step, (left, top)


def _connection(
    box: np.ndarray, label: tuple[float, float, float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The shortest line from a box to its label: two x and two y."""
    ends = []
    for axis in (0, 1):
        first, last = max(box[axis], label[axis]), min(box[axis + 2], label[axis + 2])
        middle = (first + last) / 2
        if first <= last:  # side by side
            ends.append((middle, middle))
        elif box[axis] > label[axis]:
            ends.append((box[axis], label[axis + 2]))
        else:
            ends.append((box[axis + 2], label[axis]))
    return ends[0], ends[1]


def _overlap(rectangle: tuple[float, ...], others: np.ndarray) -> float:
    """What the others hold of it, summed, relative to its area."""
    x0, y0, x1, y1 = rectangle
    width = np.minimum(x1, others[:, 2]) - np.maximum(x0, others[:, 0])
    height = np.minimum(y1, others[:, 3]) - np.maximum(y0, others[:, 1])
    return float((width.clip(min=0) * height.clip(min=0)).sum() / ((x1 - x0) * (y1 - y0)))


# Routing -----------------------------------------------------------------------------------------


def opacity(weight: np.ndarray | float) -> np.ndarray | float:
    """How strong a cell is tinted when its main expert has a weight, 0 to 1."""
    return _FAINT + (_STRONG - _FAINT) * weight


def draw_routing(
    image: np.ndarray,
    maps: Sequence[RoutedMap],
    title: str,
    seen: tuple[float, float, float, float],
) -> Figure:
    """The main expert of every cell on the image in grey, one panel per map.

    Draw within :func:`page_style`.

    Args:
        image: uint8 (H, W, 3), RGB.
        maps: What to show.
        title: Lines above the panels.
        seen: x0, y0, x1, y1 of the part that the network sees, px of the image.
    """
    height, width = image.shape[:2]
    seen = (max(0.0, seen[0]), max(0.0, seen[1]), min(width, seen[2]), min(height, seen[3]))
    visible = [_clipped(routed, seen) for routed in maps]
    experts = np.concatenate([routed.weights.argmax(2).ravel() for routed in visible])
    cells = {int(e): int(n) for e, n in zip(*np.unique(experts, return_counts=True), strict=True)}
    counts = {
        e: f'{n} cell{"s" if n > 1 else ""}' for e, n in sorted(cells.items(), key=lambda i: -i[1])
    }
    weights = [Patch(facecolor='0.2', alpha=opacity(w), label=f'weight {w:g}') for w in (0.5, 1)]
    handles = [*_handles(counts, maps[0].weights.shape[2]), *weights]
    # Neither black nor white, so that the colours look alike everywhere.
    grey = 70 + 0.65 * (image @ np.array([0.299, 0.587, 0.114]))
    grey = np.repeat(grey[..., None], 3, axis=2)
    names = [routed.name for routed in maps]
    page = _Page(grey.round().astype(np.uint8), title, names, handles)
    for axes, routed in zip(page.panels, visible, strict=True):
        _tint(page, axes, routed)
        if seen != (0, 0, width, height):
            axes.add_patch(
                Rectangle(
                    seen[:2], seen[2] - seen[0], seen[3] - seen[1], fill=False, edgecolor='white',
                    linewidth=1, linestyle='--', zorder=2,
                    path_effects=[withStroke(linewidth=2, foreground='black')],
                )
            )  # fmt: skip
    return page.figure


def _clipped(routed: RoutedMap, seen: tuple[float, float, float, float]) -> RoutedMap:
    """Without what lies in the padding."""
    x, y = np.clip(routed.x, seen[0], seen[2]), np.clip(routed.y, seen[1], seen[3])
    columns, rows = np.diff(x) > 1e-6, np.diff(y) > 1e-6
    return RoutedMap(
        routed.name,
        np.append(x[:-1][columns], x[-1]),
        np.append(y[:-1][rows], y[-1]),
        routed.weights[rows][:, columns],
    )


def _tint(page: _Page, axes: Axes, routed: RoutedMap) -> None:
    main = routed.weights.argmax(2)
    colours = np.array(
        [matplotlib.colors.to_rgb(expert_colour(e)) for e in range(routed.weights.shape[2])]
    )
    tints = np.concatenate([colours[main], opacity(routed.weights.max(2))[..., None]], axis=2)
    smallest = min(np.median(np.diff(routed.x)), np.median(np.diff(routed.y))) * page.scale
    grid = smallest >= 1.5 * page.font
    axes.pcolormesh(
        routed.x, routed.y, tints, zorder=1, antialiased=grid,
        edgecolors=(1, 1, 1, 0.7) if grid else 'none', linewidth=0.8 if grid else 0,
    )  # fmt: skip
    axes.set_xlim(0, page.size[0])
    axes.set_ylim(page.size[1], 0)
    for x, y, text, factor in _numbers(page, routed, main):
        axes.text(
            x, y, text, color='black', ha='center', va='center', fontsize=page.points(factor),
            zorder=3,
            path_effects=[withStroke(linewidth=0.2 * page.points(factor), foreground='white')],
        )  # fmt: skip


def _numbers(
    page: _Page, routed: RoutedMap, main: np.ndarray
) -> Iterator[tuple[float, float, str, float]]:
    """Texts in the cells, (x, y, text, font size): in each one, or in areas of equal ones."""
    widths, heights = np.diff(routed.x) * page.scale, np.diff(routed.y) * page.scale
    side = min(np.median(widths), np.median(heights))
    factor = max(0.92, min(1.6, 0.1 * side / page.font))
    line = 1.25 * factor * page.font
    full = 1.3 * page.text_width(f'e{routed.weights.shape[2] - 1} 0.00', factor)
    widest = page.text_width('0' * len(str(routed.weights.shape[2] - 1)), factor) + 4
    fits = (widths[None] >= widest) & (heights[:, None] >= line)
    middle = [(borders[1:] + borders[:-1]) / 2 for borders in (routed.x, routed.y)]
    for row, column in zip(*np.nonzero(fits), strict=True):
        text = str(main[row, column])
        if widths[column] >= full:
            text = f'e{text} {routed.weights[row, column].max():.2f}'
        yield middle[0][column], middle[1][row], text, factor
    for expert in np.unique(main):
        alike = ((main == expert) & ~fits).astype(np.uint8)
        # Cells from each one to the nearest other one, itself included.
        distance = cv2.distanceTransform(np.pad(alike, 1), cv2.DIST_C, 3)[1:-1, 1:-1]
        _, areas = cv2.connectedComponents(alike, connectivity=4)
        for area in range(1, areas.max() + 1):
            inside = np.where(areas == area, distance, 0)
            row, column = np.unravel_index(inside.argmax(), inside.shape)
            if (2 * inside[row, column] - 1) * side >= max(line, widest):
                yield middle[0][column], middle[1][row], str(expert), factor


# Heat --------------------------------------------------------------------------------------------


def draw_heat(image: np.ndarray, heats: Sequence[Heat], title: str, num_experts: int) -> Figure:
    """Values over the image, one panel each, from clear (0) to bright (its maximum).

    Draw within :func:`page_style`.

    Args:
        image: uint8 (H, W, 3), best in grey.
        heats: What to show, at least one.
        title: Lines above the panels.
        num_experts: Of the layer, for the legend.
    """
    experts = Counter(heat.expert for heat in heats)
    counts = {e: f'{n} panel{"s" if n > 1 else ""}' for e, n in experts.items()}
    dim = (0.45 * image).astype(np.uint8)  # the heat is bright
    page = _Page(dim, title, [heat.name for heat in heats], _handles(counts, num_experts))
    for axes, heat in zip(page.panels, heats, strict=True):
        shares = heat.values / max(heat.values.max(), 1e-30)
        colours = matplotlib.colormaps['inferno'](0.25 + 0.75 * shares)
        colours[..., 3] = 0.8 * np.sqrt(shares)
        width, height = heat.size
        axes.imshow(
            colours, extent=(0, width, height, 0), interpolation='bilinear', aspect='auto', zorder=1
        )
        x0, y0, x1, y1 = heat.box or (0, 0, *page.size)
        axes.add_patch(
            Rectangle(
                (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=expert_colour(heat.expert),
                linewidth=2, zorder=2, path_effects=[withStroke(linewidth=4, foreground='black')],
            )
        )  # fmt: skip
        axes.set_xlim(0, page.size[0])
        axes.set_ylim(page.size[1], 0)
    return page.figure
