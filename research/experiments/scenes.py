"""Balancing methods of a RetinaNet, and the demo's on generated scenes.

There every seed has its own pretrained dense model, from which all of its methods start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from mmdet_moe.analysis.interventions import ALL
from mmdet_moe.cli import apply_data_root
from mmdet_moe.datasets import digit_scenes
from research.experiments.experiment import (
    CONFIGS,
    EXPERTS,
    Experiment,
    Method,
    changed_by,
    dead_experts,
    per_layer,
)
from research.experiments.markdown import (
    NOTHING,
    mean_and_std,
    mean_per_layer,
    table,
)
from research.levels import information_on_level, positives_per_level
from research.plots import plot_specialisation
from research.runs import RunResult, mean_std


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: Of the markers and the picture in docs/results.md.
        methods: Rows of the main table, the dense model first.
        pictured: The methods of the picture.
        pretraining: The common start of all methods, if there is one.
        starts: Another start than the common one, by the names of methods.
        decision_weights: Rows of the second table, if there is one; the last one is the run of
            ``methods[1]``.
        num_dense: How many of the methods, from the first on, have no experts.
    """

    name: str
    methods: tuple[Method, ...]
    pictured: tuple[Method, ...]
    pretraining: Method | None = None
    starts: Mapping[str, Method] = field(default_factory=dict)
    decision_weights: tuple[Method, ...] = ()
    num_dense: int = 1

    @property
    def sparse(self) -> tuple[Method, ...]:
        """The methods that have experts, which are analysed."""
        return self.methods[self.num_dense :]


@dataclass(frozen=True)
class Scenes(Task):
    """A task on generated scenes.

    Attributes:
        sprites: What the scenes show, see :mod:`mmdet_moe.datasets.sprites`.
    """

    sprites: str = 'digits'


_DIGITS = (
    Method('dense', 'demo/retinanet_dense_digits'),
    Method('soft: importance', 'demo/retinanet_moe_soft_digits'),
    Method('soft: KL', 'demo/retinanet_moe_soft_kl_digits'),
    Method('hard: relative', 'demo/retinanet_moe_hard_digits'),
    Method('hard: mean', 'demo/retinanet_moe_hard_mean_digits'),
    Method('loss-free bias', 'demo/retinanet_moe_loss_free_digits'),
    Method('no balancing', 'demo/retinanet_moe_unbalanced_digits'),
)
DIGIT_SCENES = Scenes(
    name='digit-scenes',
    sprites='digits',
    pretraining=Method('pretraining', 'demo/retinanet_pretrain_digits'),
    methods=_DIGITS,
    # The one with auxiliary losses, the two with masks, and none.
    pictured=(_DIGITS[1], _DIGITS[3], _DIGITS[4], _DIGITS[6]),
    # 'positives' is the default of MoERetinaHead.
    decision_weights=tuple(
        Method(
            f'soft: importance, {weight}',
            _DIGITS[1].config,
            (f'model.bbox_head.decision_weight={weight}',),
        )
        for weight in ('uniform', 'area', 'positives')
    ),
)
_FASHION = (
    Method('dense', 'demo/retinanet_dense_fashion'),
    Method('soft: importance', 'demo/retinanet_moe_soft_fashion'),
    Method('hard: relative', 'demo/retinanet_moe_hard_fashion'),
)
FASHION_SCENES = Scenes(
    name='fashion-scenes',
    sprites='fashion-mnist',
    pretraining=Method('pretraining', 'demo/retinanet_pretrain_fashion'),
    methods=_FASHION,
    pictured=_FASHION[1:],
)
_FOUND = 'layers/*/associations'


class DetectorExperiment(Experiment):
    """All methods of a task, with the tables of detectors.

    Args:
        task: What is trained.
        *args, **kwargs: As for :class:`Experiment`.
    """

    files = {
        EXPERTS: (
            *('metrics/AP', 'interventions/metrics/AP'),
            *('interventions/layer', 'interventions/kind'),
            *(
                f'{_FOUND}/objects/{of}'
                for of in ('size_coco/mi', 'size_coco/p_adjusted', 'class/mi')
            ),
            *(f'{_FOUND}/detections/size_coco/{of}' for of in ('mi', 'p_adjusted')),
            *(f'{_FOUND}/objects/size/{of}' for of in ('mi', 'edges', 'expert_given_bin')),
            *(f'{_FOUND}/objects/size/given/level/{of}' for of in ('mi', 'interval', 'p_adjusted')),
        )
    }

    def __init__(self, task: Task, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.task = task

    @property
    def name(self) -> str:
        return self.task.name

    def prepare(self) -> None:
        """Make the data, or see whether they are there."""

    def run(self, table_only: bool = False) -> None:
        # What tables say of the data may be recorded, too.
        if not table_only or not self.records()['data']:
            self.prepare()
        self.check([*self.pretraining, *self._unique_methods()])
        if not table_only:
            self.train(self._unique_methods(), self.task.sparse)
            self.analyse(self.task.sparse)
        self.write()

    @property
    def pretraining(self) -> list[Method]:
        """What every seed begins with, if anything."""
        common = [] if self.task.pretraining is None else [self.task.pretraining]
        return [*common, *self.task.starts.values()]

    def _unique_methods(self) -> list[Method]:
        return [*self.task.methods, *self.task.decision_weights[:-1]]

    def run_of(self, method: Method) -> Method:
        weights = self.task.decision_weights
        return self.task.methods[1] if weights and method == weights[-1] else method

    def start_of(self, method: Method) -> Method | None:
        if method in self.pretraining:
            return None
        return self.task.starts.get(method.name, self.task.pretraining)

    def options(self, method: Method, seed: int) -> list[str]:
        return [*super().options(method, seed), *self.start_options(method, seed)]

    def _positives(self) -> list[float]:
        cfg = Config.fromfile(CONFIGS / f'{self.task.methods[0].config}.py')
        apply_data_root(cfg, str(self.data))
        return positives_per_level(cfg).tolist()

    def write(self) -> None:
        task = self.task
        objects = torch.tensor(self.of_data('positive anchors by level', self._positives))
        rows = {task.name: task.methods}
        if task.decision_weights:
            rows['decision-weights'] = task.decision_weights
        results = {
            marker: {method.name: self.results(method) for method in methods}
            for marker, methods in rows.items()
        }
        tables = {marker: markdown_table(runs, objects) for marker, runs in results.items()}
        found = {method.name: self.analyses(method) for method in task.sparse}
        tables[f'{task.name}-specialisation'] = specialisation_table(found)
        pictures = {}
        if all(found[method.name] for method in task.pictured):
            first = {method.name: found[method.name][0] for method in task.pictured}
            pictures[f'{task.name}-specialisation.png'] = partial(plot_specialisation, first)
        runs = [*found.values(), *(runs for group in results.values() for runs in group.values())]
        self.publish(all(len(r) == len(self.seeds) for r in runs), tables, pictures)


class ScenesExperiment(DetectorExperiment):
    """All methods on one kind of scenes.

    Args:
        scenes: What is trained on what.
        source: Folder of the sprites' files, for those that do not come with a package.
        *args, **kwargs: As for :class:`Experiment`.
    """

    def __init__(self, scenes: Scenes, *args, source: Path | None = None, **kwargs) -> None:
        super().__init__(scenes, *args, **kwargs)
        self.scenes = scenes
        self.source = source

    def prepare(self) -> None:
        digit_scenes.generate(
            self.data,
            num_train=1000,
            num_val=200,
            size=256,
            seed=0,
            sprites=self.scenes.sprites,
            source=self.source,
        )


def markdown_table(results: dict[str, list[RunResult]], objects: Tensor) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        results: The finished runs by method.
        objects: Positive anchors of the validation set by level, (L,).
    """
    columns = (
        'method', 'seeds', 'AP', 'AP50', 'AP small', 'AP medium', 'AP large', 'load CV²',
        'dead experts', 'information on input', 'on level', 'on level, by objects',
    )  # fmt: skip

    def on_objects(run: RunResult) -> list[float]:
        reports = run.layers.values()
        return [information_on_level(report['level_shares'], objects) for report in reports]

    def rows() -> Iterator[list[str]]:
        for name, runs in results.items():
            if not runs:
                continue
            cells = [name, str(len(runs))]
            cells += [mean_and_std([run.metrics[m] for run in runs]) for m in columns[2:7]]
            if runs[0].layers:
                cells += [
                    per_layer(runs, 'load_cv2'),
                    dead_experts(runs),
                    per_layer(runs, 'mi_input'),
                    per_layer(runs, 'mi_level'),
                    mean_per_layer([on_objects(run) for run in runs]),
                ]
            else:
                cells += [NOTHING] * 5
            yield cells

    return table(columns, rows())


def specialisation_table(found: dict[str, list[dict]]) -> str:
    """Mean over the seeds, ``cls / reg`` for the two MoE layers, one row per method.

    Args:
        found: Contents of ``experts.json`` by method.
    """
    columns = (
        'method', 'seeds', 'size of objects', 'of detections', 'largest p', 'size given level',
        'at most', 'smallest p', 'class', 'AP',
        'best expert alone', 'worst expert alone', 'all alike', 'at random', 'both at random',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, runs in found.items():
            if not runs:
                continue
            of_objects, of_detections, of_class = (
                _over_layers(runs, lambda run, x, a=a: _association(run, x, *a)['mi'])
                for a in (
                    ('objects', 'size_coco'), ('detections', 'size_coco'), ('objects', 'class'),
                )
            )  # fmt: skip
            best, worst, equal, random = (
                _over_layers(runs, lambda run, x, f=f: f(changed_by(run, x, 'AP')), digits=3)
                for f in (
                    lambda changed: max(changed['only']),
                    lambda changed: min(changed['only']),
                    lambda changed: changed['equal'][0],
                    lambda changed: changed['random'][0],
                )
            )
            beyond = _over_layers(runs, lambda run, x: _beyond_level(run, x)['mi'], digits=4)
            most = ' / '.join(
                f'{max(_beyond_level(run, layer)["interval"][1] for run in runs):.4f}'
                for layer in runs[0]['layers']
            )
            least_p = min(
                _beyond_level(run, x)['p_adjusted'] for run in runs for x in run['layers']
            )
            both = mean_std([changed_by(run, ALL, 'AP')['random'][0] for run in runs])[0]
            ap = mean_and_std([run['metrics']['AP'] for run in runs])
            yield [
                name, str(len(runs)), of_objects, of_detections, f'{max(_p_values(runs)):.3f}',
                beyond, most, f'{least_p:.3f}', of_class, ap, best, worst, equal, random,
                f'{both:.3f}',
            ]  # fmt: skip

    return table(columns, rows())


def _over_layers(runs: Sequence[dict], value: Callable[[dict, str], float], digits: int = 2) -> str:
    return mean_per_layer([[value(run, name) for name in run['layers']] for run in runs], digits)


def _association(run: dict, layer: str, source: str, attribute: str) -> dict:
    return run['layers'][layer]['associations'][source][attribute]


def _beyond_level(run: dict, layer: str) -> dict:
    """What the choice knows of the objects' size once the level is known."""
    return _association(run, layer, 'objects', 'size')['given']['level']


def _p_values(runs: Sequence[dict]) -> Iterator[float]:
    for run in runs:
        for layer in run['layers']:
            for source in ('objects', 'detections'):
                yield _association(run, layer, source, 'size_coco')['p_adjusted']
