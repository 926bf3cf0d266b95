"""Can the experts of a head specialise by object size beyond the pyramid level?

A router with one decision for each image and level is a table of levels: an image has objects of
several sizes on every level. Here it decides for patches or pixels, or sees each level normalised,
or is balanced within the levels, on the demo's digit scenes. Every seed has its own pretrained
dense model, from which all of its runs start.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.statistics.bins import SIZES
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.errors import ConfigError
from research.experiments.experiment import Method
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.experiments.scenes import DIGIT_SCENES, DetectorExperiment
from research.runs import mean_std, run_process
from research.size_information import FILE

#: A head of which this is true specialises by size beyond the level: nats, at no less AP.
TARGET = 0.10
SUMMARY = 'size_beyond_level.json'
NAME = 'size-beyond-level'

_IMAGE = 'demo/retinanet_moe_soft_digits'
_PATCH = 'demo/retinanet_moe_patch_digits'
_PIXEL = 'demo/retinanet_moe_pixel_digits'
_ROUTER = 'model.bbox_head.router'
_NORMALISED = (f'{_ROUTER}.normalise_levels=5',)
_WITHIN = ('custom_hooks.1.loss.within=level',)
_BOTH = (*_NORMALISED, *_WITHIN)
_CLUSTERS = (f'{_ROUTER}.init=kmeans', f'{_ROUTER}.noise=False')
METHODS = (
    Method('dense', 'demo/retinanet_dense_digits'),
    Method('image', _IMAGE),
    Method('image: both', _IMAGE, _BOTH),
    Method('patch', _PATCH),
    Method('pixel', _PIXEL),
    Method('pixel: level normalised', _PIXEL, _NORMALISED),
    Method('pixel: balanced within levels', _PIXEL, _WITHIN),
    Method('pixel: both', _PIXEL, _BOTH),
    Method('pixel: both, sharp', 'demo/retinanet_moe_pixel_sharp_digits'),
    Method('pixel: k-means start', _PIXEL, _CLUSTERS),
    Method('pixel: level normalised, k-means start', _PIXEL, (*_NORMALISED, *_CLUSTERS)),
)
#: With ``--quick``, which shows that everything works and nothing else.
QUICK = 'pixel: both'


class MeasuredExperiment(DetectorExperiment):
    """Base class: each run is measured by :mod:`research.size_information`.

    Attributes:
        methods: Those that are trained.
    """

    methods: Sequence[Method]
    files = {
        **DetectorExperiment.files,
        FILE: (
            *(f'layers/*/trained/{of}' for of in ('level', 'by_level_and_size')),
            *(f'layers/*/trained/size/{of}' for of in ('mi', 'given_level', 'chance', 'p_value')),
            *(f'layers/*/trained/{of}/given_level' for of in ('class', 'position')),
            'layers/*/random/size/given_level',
        ),
    }

    def train_and_measure(self) -> None:
        """Train and measure what is missing, after what it starts from.

        Raises:
            ConfigError: If a run fails.
        """
        runs = [run for run in self._runs(self.methods) if not self._is_done(*run)]
        self._train_starts(runs)
        self._in_parallel(runs, lambda run: self._train_and_measure(*run), 'runs')

    def _is_done(self, method: Method, seed: int) -> bool:
        measured = method is self.task.methods[0] or self.read(method, seed, FILE) is not None
        return measured and self._result(method, seed) is not None

    def _train_and_measure(self, method: Method, seed: int) -> None:
        if self._here(method, seed) is None:
            self._train_one(method, seed)
        folder = self.run_dir(method, seed)
        if method is not self.task.methods[0]:
            with (folder / 'output.log').open('a') as log:
                run_process(['-m', 'research.size_information'], [str(folder)], 1, log)

    def found(self) -> dict[str, list[dict]]:
        """Figures of the finished runs, by method: ``seed``, ``metrics`` and ``layers``."""
        found = {}
        for method in self.methods:
            runs = []
            for seed in self.seeds:
                if self._is_done(method, seed):
                    measured = self.read(method, seed, FILE) or {}
                    metrics = self._result(method, seed).metrics
                    runs.append({'seed': seed, 'metrics': metrics, **measured})
            if runs:
                found[method.name] = runs
        return found


class SizesExperiment(MeasuredExperiment):
    """All methods, and what their experts have to do with the sizes of the objects.

    Args:
        *args: As for :class:`Experiment`.
        methods: Names of those that are trained; by default all.
        quick: Few images and iterations, in a folder ``quick`` of the work directory.
    """

    def __init__(self, *args, methods: Sequence[str] = (), quick: bool = False) -> None:
        scenes = replace(DIGIT_SCENES, name=NAME, methods=METHODS, pictured=(), decision_weights=())
        super().__init__(scenes, *args)
        known = [method.name for method in METHODS]
        if unknown := sorted(set(methods) - set(known)):
            raise ConfigError(
                f'--methods {unknown[0]!r} is unknown; choose from {", ".join(map(repr, known))}'
            )
        self.quick, self.is_default = quick, not quick
        if quick:
            self.work_dir /= 'quick'
            self.data = self.work_dir / 'data'
            self.seeds, methods = self.seeds[:1], methods or [QUICK]
        self.methods = [m for m in METHODS if not methods or m.name in methods]

    def run(self, table_only: bool = False) -> None:
        self.check([*self.pretraining, *self.methods])
        if not table_only:
            images, val = (40, 16) if self.quick else (1000, 200)
            digit_scenes.generate(self.data, num_train=images, num_val=val, size=256, seed=0)
            self.train_and_measure()
        self.write()

    def options(self, method: Method, seed: int) -> list[str]:
        options = super().options(method, seed)
        if self.quick:
            options += ['train_cfg.max_iters=10', 'train_cfg.val_interval=10']
        return options

    def write(self) -> None:
        found = self.found()
        self.work_dir.mkdir(parents=True, exist_ok=True)
        write_file(self.work_dir / SUMMARY, json.dumps(found, indent=1).encode())
        complete = all(len(found.get(method.name, ())) == len(self.seeds) for method in METHODS)
        pictures = {}
        if any('layers' in run for runs in found.values() for run in runs):
            pictures[f'{NAME}.png'] = partial(plot, found)
        self.publish(complete, {NAME: markdown_table(found)}, pictures)


def markdown_table(found: dict[str, list[dict]]) -> str:
    """Mean ± standard deviation over the seeds, ``cls / reg`` for the two MoE layers.

    Args:
        found: As :meth:`SizesExperiment.found` gives it.
    """
    columns = (
        'method', 'seeds', 'AP', 'AP small', 'AP medium', 'AP large', 'size given level',
        'by chance', 'with random routers', 'largest p', 'size', 'level', 'class given level',
        'position given level', 'reached',
    )  # fmt: skip
    soft = [run['metrics']['AP'] for run in found.get(METHODS[1].name, ())]

    def rows() -> Iterator[list[str]]:
        for name, runs in found.items():
            cells = [name, str(len(runs))]
            cells += [
                mean_and_std([run['metrics'][metric] for run in runs]) for metric in columns[2:6]
            ]
            if 'layers' not in runs[0]:
                yield [*cells, *[NOTHING] * (len(columns) - len(cells))]
                continue
            given = _trained(runs, lambda layer: layer['size']['given_level'])
            p_values = _trained(runs, lambda layer: layer['size']['p_value'])
            reached = NOTHING
            if soft:
                ap, least = (mean_std(x)[0] for x in ([r['metrics']['AP'] for r in runs], soft))
                enough = all(mean_std(of_layer)[0] >= TARGET for of_layer in given.values())
                reached = 'yes' if enough and ap >= least else 'no'
            yield [
                *cells,
                _cells(given, 3, std=True),
                _cells(_trained(runs, lambda layer: layer['size']['chance']), 3),
                _cells(_random(runs), 3),
                f'{max(p for of_layer in p_values.values() for p in of_layer):.3f}',
                _cells(_trained(runs, lambda layer: layer['size']['mi'])),
                _cells(_trained(runs, lambda layer: layer['level'])),
                _cells(_trained(runs, lambda layer: layer['class']['given_level'])),
                _cells(_trained(runs, lambda layer: layer['position']['given_level'])),
                reached,
            ]

    return table(columns, rows())


def _trained(runs: Sequence[dict], value: Callable[[dict], float]) -> dict[str, list[float]]:
    """A figure of each layer, by seed."""
    return {n: [value(run['layers'][n]['trained']) for run in runs] for n in runs[0]['layers']}


def _random(runs: Sequence[dict]) -> dict[str, list[float]]:
    """I(size; expert | level) of the random routers in each layer, by seed and draw."""
    return {
        name: [
            draw['size']['given_level'] for run in runs for draw in run['layers'][name]['random']
        ]
        for name in runs[0]['layers']
    }


def _cells(values: dict[str, list[float]], digits: int = 2, std: bool = False) -> str:
    if std:
        return ' / '.join(mean_and_std(of_layer, digits) for of_layer in values.values())
    return ' / '.join(f'{mean_std(of_layer)[0]:.{digits}f}' for of_layer in values.values())


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """Which expert sees which size on each of the first levels, of every method's first seed.

    Args:
        found: As :meth:`SizesExperiment.found` gives it.
        path: Of the picture.
    """
    shown = {name: runs[0]['layers'] for name, runs in found.items() if 'layers' in runs[0]}
    layer = next(iter(next(iter(shown.values()))))
    levels = 2  # the small images have next to no objects above
    figure, axes = plt.subplots(
        len(shown), levels, figsize=(7, 1.3 * len(shown) + 0.6), squeeze=False, sharex=True
    )
    for row, (name, layers) in zip(axes, shown.items(), strict=True):
        tables = np.array(layers[layer]['trained']['by_level_and_size'])
        for level, (axis, counts) in enumerate(zip(row, tables, strict=False)):
            sums = counts.sum(1, keepdims=True)
            # Few objects say nothing.
            shares = np.where(sums >= 5, counts / np.maximum(sums, 1), np.nan)
            bottom = np.zeros(len(shares))
            for expert in range(shares.shape[1]):
                axis.bar(SIZES.names[: len(shares)], shares[:, expert], bottom=bottom, width=0.95)
                bottom = bottom + shares[:, expert]
            axis.set_ylim(0, 1)
            axis.set_title(f'{name}, level {level}', fontsize=7)
            axis.tick_params(labelsize=6, axis='y')
            axis.tick_params(labelsize=6, axis='x', rotation=60)
    figure.supxlabel('sqrt(area) in px', fontsize=8)
    figure.supylabel('share of the experts (classification)', fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
