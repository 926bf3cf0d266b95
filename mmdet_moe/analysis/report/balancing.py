"""How the experts of several runs are used over their trainings, side by side.

Everything is drawn from what :class:`~mmdet_moe.engine.hooks.ExpertUtilizationHook` logged:

========================  =========================================================================
``balancing_steps``       the load of every expert at a few iterations, as bars
``balancing_training``    the whole training: a lane for each expert, with its load, its importance,
                          the load that inference would give it, masks, bias and death
``balancing.gif``         the bars of all iterations one after the other
========================  =========================================================================

Loads are multiples of the fair share 1 / E, so that runs with other numbers of experts compare.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.report.figures import write_figure
from mmdet_moe.drawing import PAGE_WIDTH, expert_ticks, new_figure, style, to_rgb, wrapped
from mmdet_moe.moe.utilization import DEAD_SHARE, DISAGREEMENT

#: Iterations of the stepwise figure, if none are chosen.
NUM_STEPS = 5
#: Pictures of the animation at most.
MAX_FRAMES = 60

_LOAD, _IMPORTANCE, _MASK = '#56B4E9', '#0B3C6F', '0.45'
_DEAD, _DEAD_BACK = '#B5351C', '#F6DCD6'
_CROSS: dict[str, Any] = dict(
    linestyle='', marker='X', markersize=6, color=_DEAD, markeredgewidth=0
)
_HALO = [withStroke(linewidth=2, foreground='white')]
_FRAME_MS, _LAST_FRAME_MS = 200, 2500


@dataclass(frozen=True)
class LayerHistory:
    """The use of the experts of one layer over a training, as logged.

    Attributes:
        steps: (S,) training iterations, ascending; each value is over those since the one before.
        load: (S, E), share of the routed rows of each expert.
        importance: (S, E), share of the importance.
        inference_load: (S, E), the load without noise and masks; None in logs of earlier versions.
        masked: (S, E), share of the batches after which a hard constraint masked an expert; None
            without one.
        bias: (S, E), the bias of loss-free balancing; None without it.
    """

    steps: np.ndarray
    load: np.ndarray
    importance: np.ndarray
    inference_load: np.ndarray | None = None
    masked: np.ndarray | None = None
    bias: np.ndarray | None = None

    @classmethod
    def from_history(cls, history: Mapping[str, list]) -> 'LayerHistory':
        """From one layer of :func:`~mmdet_moe.analysis.report.history.read_history`."""
        fields = ('load', 'importance', 'inference_load', 'masked', 'bias')
        return cls(
            np.array(history['step']),
            **{name: np.array(history[name], float) for name in fields if name in history},
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.load.shape[1]

    def dead(self) -> np.ndarray:
        """bool (S, E): inference would give an expert less than 1 % of its fair share.

        Where that has not been logged it is the load of the training.
        """
        load = self.load if self.inference_load is None else self.inference_load
        return load < DEAD_SHARE / self.num_experts

    def dead_since(self) -> list[int | None]:
        """For each expert the logged iteration from which on it is dead to the end, or None."""
        dead = self.dead()
        to_the_end = np.logical_and.accumulate(dead[::-1])[::-1]
        return [
            int(self.steps[to_the_end[:, e].argmax()]) if dead[-1, e] else None
            for e in range(self.num_experts)
        ]

    def disagreement(self) -> np.ndarray | None:
        """(S,), the share of the rows that inference would give to another expert, at least."""
        if self.inference_load is None:
            return None
        return np.abs(self.load - self.inference_load).sum(1) / 2

    def verdict(self) -> str:
        """What came of it, in a few words."""
        num_dead = sum(step is not None for step in self.dead_since())
        parts = [f'{num_dead} of {self.num_experts} dead' if num_dead else 'all alive']
        disagreement = self.disagreement()
        if disagreement is not None and disagreement[-1] >= DISAGREEMENT:
            parts.append(f'{100 * disagreement[-1]:.0f} % elsewhere at inference')
        return ', '.join(parts)


def write_balancing(
    layer: str,
    runs: Mapping[str, LayerHistory],
    folder: Path,
    steps: Sequence[int] = (),
    animate: bool = False,
) -> list[Path]:
    """Draw a layer of several runs.

    Args:
        layer: Its name.
        runs: By the name of the run.
        folder: Where to; made if it does not exist.
        steps: The iterations of the stepwise figure, of each the nearest that any run logged; by
            default :data:`NUM_STEPS`, closer together at the beginning, where most is decided.
        animate: Whether to write the animation, too.

    Returns:
        The files written.

    Raises:
        ConfigError: Nothing can be written there.
    """
    with style():
        paths = write_figure(draw_steps(layer, runs, steps), folder, 'balancing_steps')
        paths += write_figure(draw_training(layer, runs), folder, 'balancing_training')
        if animate:
            paths.append(write_file(folder / 'balancing.gif', animation(layer, runs)))
    return paths


def early_steps(runs: Mapping[str, LayerHistory], count: int = NUM_STEPS) -> list[int]:
    """Logged iterations of the longest run, the first and the last among them, evenly in log."""
    steps = max((run.steps for run in runs.values()), key=lambda steps: steps[-1])
    wanted = np.geomspace(max(steps[0], 1), max(steps[-1], 1), count)
    return sorted({int(steps[np.abs(steps - step).argmin()]) for step in wanted})


def draw_steps(layer: str, runs: Mapping[str, LayerHistory], steps: Sequence[int] = ()) -> Figure:
    """A row for each run, a column for each iteration, in each the bars of the experts."""
    logged = np.unique(np.concatenate([run.steps for run in runs.values()]))
    nearest = {int(logged[np.abs(logged - step).argmin()]) for step in steps}
    steps = sorted(nearest) or early_steps(runs)
    figure = new_figure(PAGE_WIDTH, 1.0 + 0.95 * len(runs))
    figure.suptitle(wrapped(f'{layer}: load of each expert (1 = its fair share)', PAGE_WIDTH))
    grid = figure.subplots(len(runs), len(steps), sharex='row', sharey=True, squeeze=False)
    for row, (name, run) in zip(grid, runs.items(), strict=True):
        for axes, step in zip(row, steps, strict=True):
            _bars(axes, run, step, _top(runs))
        text = _label(name, run, 1.1)
        row[0].set_ylabel(text, fontsize=7.5, rotation=0, ha='right', va='center')
    for axes, step in zip(grid[0], steps, strict=True):
        axes.set_title(f'iteration {step}')
    for axes in grid[-1]:
        axes.set_xlabel('expert')
    _legend(figure, runs)
    return figure


def draw_training(layer: str, runs: Mapping[str, LayerHistory]) -> Figure:
    """A column for each run, with a lane for each expert, and one for the disagreement."""
    experts = max(run.num_experts for run in runs.values())
    told = any(run.inference_load is not None for run in runs.values())
    lane = min(0.62, 7.0 / experts)
    figure = new_figure(PAGE_WIDTH, 1.35 + lane * experts + 0.65 * told)
    figure.suptitle(wrapped(f'{layer}: load of the experts over the training', PAGE_WIDTH))
    figure.get_layout_engine().set(hspace=0.0, h_pad=0.02)
    grid = figure.subplots(
        experts + told, len(runs), sharex='col', squeeze=False,
        height_ratios=[lane] * experts + [0.5] * told,
    )  # fmt: skip
    labels = expert_ticks(experts)
    for column, (name, run) in zip(grid.T, runs.items(), strict=True):
        column[0].set_title(_label(name, run, PAGE_WIDTH / len(runs) - 0.3), fontsize=7.5)
        for e, axes in enumerate(column[:experts]):
            if e < run.num_experts:
                _lane(axes, run, e, _top(runs, importance=True))
            else:
                axes.set_axis_off()
        if told:
            _disagreement(column[-1], run)
        column[-1].set_xlabel('iteration')
        column[-1].xaxis.set_major_locator(MaxNLocator(3, integer=True))
        column[-1].tick_params(axis='x', labelbottom=True, length=2)
    for e, axes in enumerate(grid[:experts, 0]):
        label = f'expert {e}' if experts <= 8 else labels[e]
        axes.set_ylabel(label, rotation=0, ha='right', va='center')
    if told:
        grid[-1, 0].set_ylabel(
            'would go\nelsewhere at\ninference', rotation=0, ha='right', va='center'
        )
    _legend(figure, runs, lanes=True)
    return figure


def animation(layer: str, runs: Mapping[str, LayerHistory]) -> bytes:
    """The bars of all runs side by side, iteration by iteration: the content of a GIF file."""
    steps = np.unique(np.concatenate([run.steps for run in runs.values()]))
    if len(steps) > MAX_FRAMES:
        steps = steps[np.unique(np.geomspace(1, len(steps), MAX_FRAMES).astype(int) - 1)]
    frames = []
    for step in steps:
        figure = new_figure(PAGE_WIDTH, 2.3)
        figure.suptitle(f'{layer}, iteration {step}')
        panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for axes, (name, run) in zip(panels, runs.items(), strict=True):
            _bars(axes, run, step, _top(runs))
            axes.set_title(wrapped(name, PAGE_WIDTH / len(runs) - 0.2))
            axes.set_xlabel('expert')
        panels[0].set_ylabel('load (1 = fair share)')
        _legend(figure, runs)
        frames.append(Image.fromarray(to_rgb(figure, dpi=100)))
    # One palette for all, so that colours do not flicker; that of the last picture has them all.
    palette = frames[-1].quantize(64, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    frames[0].save(
        content, format='GIF', save_all=True, append_images=frames[1:], loop=0, optimize=True,
        duration=[_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS],
    )  # fmt: skip
    return content.getvalue()


def _label(name: str, run: LayerHistory, width: float) -> str:
    """What a run is called, and what came of it, in lines of ``width`` inches."""
    return '\n'.join(wrapped(part, width, 7.5) for part in (name, *run.verdict().split(', ')))


def _top(runs: Mapping[str, LayerHistory], importance: bool = False) -> float:
    """The end of all axes of loads, in fair shares."""
    values = [
        run.num_experts * shares.max()
        for run in runs.values()
        for shares in (run.load, run.inference_load, run.importance if importance else None)
        if shares is not None
    ]
    return 1.1 * max(1.5, *values)


def _bars(axes: Axes, run: LayerHistory, step: int, top: float) -> None:
    """The experts of one run at the logged iteration next to ``step``, which is told if it is
    another one; none after its end."""
    experts = run.num_experts
    axes.set_ylim(0, top)
    axes.set_xlim(-0.6, experts - 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    ticks = expert_ticks(experts, most=8)
    axes.set_xticks([e for e in range(experts) if ticks[e]], [tick for tick in ticks if tick])
    axes.tick_params(axis='x', length=0)
    if step > run.steps[-1] + np.diff(run.steps).max(initial=0):
        axes.text(0.5, 0.5, 'no more', ha='center', color='0.5', transform=axes.transAxes)
        return
    at = int(np.abs(run.steps - step).argmin())
    if run.steps[at] != step:
        axes.text(
            0.5, 0.97, f'at {run.steps[at]}', ha='center', va='top', fontsize=7,
            transform=axes.transAxes, path_effects=_HALO,
        )  # fmt: skip
    places, loads = np.arange(experts), experts * run.load[at]
    dead = run.dead()[at]
    axes.bar(places, loads, 0.8, color=_LOAD)
    if run.masked is not None:
        axes.bar(  # like a shutter, from above
            places, -top * run.masked[at], 0.8, bottom=top, facecolor='none', edgecolor=_MASK,
            hatch='/////', linewidth=0,
        )  # fmt: skip
    if run.inference_load is not None:
        axes.hlines(
            experts * run.inference_load[at], places - 0.4, places + 0.4, color='black',
            linewidth=1.6, clip_on=False,
        )  # fmt: skip
    axes.plot(places[dead], np.full(dead.sum(), 0.16 * top), **_CROSS)
    _fair_share(axes)


def _lane(axes: Axes, run: LayerHistory, expert: int, top: float) -> None:
    """One expert of one run over the training."""
    edges = _edges(run.steps)
    since = run.dead_since()[expert]
    if since is not None:
        start = edges[np.flatnonzero(run.steps == since)[0]]
        axes.axvspan(start, edges[-1], color=_DEAD_BACK, linewidth=0)
        axes.text(
            edges[-1], 0.92 * top, f'dead since {since} ', color=_DEAD, fontsize=7, ha='right',
            va='top', path_effects=_HALO,
        )  # fmt: skip
    axes.stairs(run.num_experts * run.load[:, expert], edges, fill=True, color=_LOAD)
    if run.masked is not None:
        axes.stairs(
            top * (1 - run.masked[:, expert]), edges, baseline=top, fill=True, facecolor='none',
            edgecolor=_MASK, hatch='//////', linewidth=0,
        )  # fmt: skip
    if run.inference_load is not None:
        axes.stairs(
            run.num_experts * run.inference_load[:, expert], edges, color='black', linewidth=0.9,
            baseline=None,
        )  # fmt: skip
    axes.stairs(
        run.num_experts * run.importance[:, expert], edges, color=_IMPORTANCE, linewidth=0.8,
        linestyle=(0, (1, 1)), baseline=None,
    )  # fmt: skip
    if run.bias is not None:
        axes.text(
            edges[-1],
            0.06 * top,
            f'bias {run.bias[-1, expert]:+.3f} ',
            fontsize=7,
            ha='right',
            path_effects=_HALO,
        )
    _fair_share(axes)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(NullLocator())
    axes.tick_params(axis='x', labelbottom=False, length=0)


def _disagreement(axes: Axes, run: LayerHistory) -> None:
    """The share of the rows that inference would send elsewhere."""
    values = run.disagreement()
    if values is None:
        axes.text(0.5, 0.5, 'not logged', ha='center', transform=axes.transAxes, color='0.5')
    else:
        axes.stairs(values, _edges(run.steps), fill=True, color='0.45')
        axes.text(
            0.5, 0.85, f'at most {100 * values.max():.0f} %', ha='center', va='top', fontsize=7,
            transform=axes.transAxes,
        )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(NullLocator())


def _fair_share(axes: Axes) -> None:
    axes.axhline(1, color='0.35', linewidth=0.8, linestyle=(0, (3, 2)))


def _edges(steps: np.ndarray) -> np.ndarray:
    """(S + 1,): each logged value is over the iterations since the one before."""
    first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else steps[0] - 1
    return np.concatenate([[first], steps])


def _legend(figure: Figure, runs: Mapping[str, LayerHistory], lanes: bool = False) -> None:
    handles = [Patch(color=_LOAD, label='load in training')]
    if any(run.inference_load is not None for run in runs.values()):
        handles.append(Line2D([], [], color='black', label='load that inference would give'))
    if lanes:
        handles.append(Line2D([], [], color=_IMPORTANCE, linestyle=':', label='importance'))
    handles.append(Line2D([], [], color='0.35', linewidth=0.8, linestyle='--', label='fair share'))
    if any(run.masked is not None for run in runs.values()):
        handles.append(
            Patch(
                facecolor='none',
                edgecolor=_MASK,
                hatch='/////',
                linewidth=0,
                label='masked',
            )
        )
    if any(run.dead().any() for run in runs.values()):
        mark = (
            Patch(color=_DEAD_BACK, label='dead')
            if lanes
            else Line2D([], [], **_CROSS, label='dead')
        )
        handles.append(mark)
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
