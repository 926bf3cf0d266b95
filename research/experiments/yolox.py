"""A detector that COCO has trained becomes sparse by path: what do its experts learn?

YOLOX-nano with the weights of its authors is fine-tuned on a few images of COCO, as it is and with
experts in the last stage of the backbone, in the neck, in the head, and in all three. One of four
experts counts in full, so that all of them cost the same, and begin with the outputs of the dense
model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.files import scratch_folder
from mmdet_moe.moe.flops import count_flops
from research.experiments.experiment import CONFIGS, EXPERTS, Method, dead_experts, per_layer
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.experiments.photographs import Photographs, PhotographsExperiment
from research.experiments.settings import fingerprint
from research.runs import COCO_METRICS, RunResult, evaluate, mean_std

#: Edge of the images in px, as the configs have it.
SIDE = 416
_CONFIG = 'yolox_nano_{}_coco_subset'
YOLOX = Photographs(
    name='yolox',
    methods=(
        Method('dense', _CONFIG.format('dense')),
        Method('backbone', _CONFIG.format('moe_backbone')),
        Method('neck', _CONFIG.format('moe_neck')),
        Method('head', _CONFIG.format('moe_head')),
        Method('backbone, neck and head', _CONFIG.format('moe_all')),
    ),
    pictured=(),
    epochs=4,
)

#: What the detections have, by its name in ``experts.json``, and as the table calls it.
_ATTRIBUTES = {'class': 'class', 'size_coco': 'size', 'level': 'level'}


class YoloxExperiment(PhotographsExperiment):
    """All places of the experts.

    Args:
        *args, **kwargs: As for :class:`PhotographsExperiment`, after the task.
    """

    #: They would take longer than the training: a hundred evaluations of the model with 11 layers.
    analysis_options = ('--no-interventions',)
    measured = 'the whole model'
    files = {
        EXPERTS: [
            f'layers/*/associations/detections/{of}/{figure}'
            for of in _ATTRIBUTES
            for figure in ('mi', 'chance', 'p_adjusted', 'mi_max', 'num_images')
        ]
    }

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(YOLOX, *args, **kwargs)
        self.headline = (
            f'{self.epochs} epochs, 16 images an iteration, mixed precision, AdamW, all weights'
        )

    def _with_files(self, methods: Sequence[Method]) -> tuple[Method, ...]:
        """The same methods, which have configs."""
        return tuple(methods)

    def prepare(self, check: bool = True) -> None:
        super().prepare(check)
        for method in self.methods:
            cfg = load_config(
                str(CONFIGS / f'{method.config}.py'), parse_options([f'data_root={self.data}'])
            )
            if check:
                check_config(cfg)
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                model = build_model(cfg)
            # Before there are trainings, which it would disturb in one process.
            self._flops[method.name] = count_flops(model, torch.randn(1, 3, SIDE, SIDE))

    def train(self, methods: Sequence[Method], analysed: Sequence[Method] = ()) -> None:
        starts = [method for method in methods if self._start(method) is None]
        self._in_parallel(starts, self._evaluate_start, 'tests before the training')
        super().train(methods, analysed)

    def _start_file(self, method: Method) -> Path:
        return self.work_dir / method.key / 'start.json'

    def _start(self, method: Method) -> dict[str, float] | None:
        """Metrics before the training, with the weights that all begin with.

        Those of other settings, or of earlier versions, which did not tell them, are measured anew.
        """
        name, file = f'{method.name}, before', self._start_file(method)
        if file.exists():
            found = json.loads(file.read_text())
            return found['metrics'] if found.get('settings') == self._settings_of(method) else None
        is_recorded = self.is_default and self._has_recorded_data()
        return self.records()['data'].get(name) if is_recorded else None

    def _settings_of(self, method: Method) -> str:
        return fingerprint(CONFIGS / f'{method.config}.py', method.options)

    def _evaluate_start(self, method: Method) -> None:
        config, file = CONFIGS / f'{method.config}.py', self._start_file(method)
        file.parent.mkdir(parents=True, exist_ok=True)
        options = [f'data_root={self.data}', 'test_dataloader.num_workers=0']
        options.append('test_dataloader.persistent_workers=False')
        with (
            (file.parent / 'output.log').open('a') as log,
            scratch_folder(file.parent / 'start') as scratch,
        ):
            weights = load_config(str(config)).load_from
            metrics = evaluate(config, weights, scratch, options, threads=1, output=log)
        content = {'settings': self._settings_of(method), 'metrics': metrics}
        write_file(file, json.dumps(content).encode())

    def write(self) -> None:
        results = {method.name: self.results(method) for method in self.methods}
        starts = {
            method.name: start
            for method in self.methods
            if (start := self._start(method)) is not None
        }
        found = {method.name: self.analyses(method) for method in self.task.sparse}
        runs = [*results.values(), *found.values()]
        complete = len(starts) == len(results) and all(len(r) == len(self.seeds) for r in runs)
        name = self.task.name
        tables = {
            name: markdown_table(results, starts),
            f'{name}-specialisation': specialisation_table(found),
        }
        self.publish(complete, tables, {})


def markdown_table(
    results: Mapping[str, Sequence[RunResult]], starts: Mapping[str, Mapping[str, float]]
) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        results: The finished runs by method.
        starts: Metrics before the training by method, of the same names as those of the runs.
    """
    metrics = tuple(COCO_METRICS.values())
    columns = (
        'method', 'seeds', 'AP before', *metrics, 'parameters', 'load CV²', 'dead experts',
        'information on input',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, runs in results.items():
            if not runs:
                continue
            before = f'{starts[name]["AP"]:.3f}' if name in starts else NOTHING
            cells = [name, str(len(runs)), before]
            cells += [mean_and_std([run.metrics[metric] for run in runs]) for metric in metrics]
            cells.append(f'{runs[0].total_parameters / 1e3:,.0f} k')
            if not runs[0].layers:
                yield [*cells, *[NOTHING] * 3]
                continue
            information = per_layer(runs, 'mi_input')
            yield [*cells, per_layer(runs, 'load_cv2'), dead_experts(runs), information]

    return table(columns, rows())


def specialisation_table(found: Mapping[str, Sequence[dict]]) -> str:
    """Means over the seeds, one row per layer.

    It is about detections: YOLOX assigns objects by what it predicts, so that an object has no
    level, and layers that work on one level have nothing to do with any object.

    Args:
        found: Contents of ``experts.json`` by method.
    """
    columns = ['method', 'layer', 'seeds', 'images']
    for name in _ATTRIBUTES.values():
        columns += [name, 'by chance', 'largest p']

    def rows() -> Iterator[list[str]]:
        for name, runs in found.items():
            for layer in runs[0]['layers'] if runs else ():
                of_runs = [run['layers'][layer]['associations']['detections'] for run in runs]
                seen = mean_std([of['class']['num_images'] for of in of_runs])[0]
                cells = [name, f'`{layer}`', str(len(runs)), f'{seen:.0f}']
                for attribute in _ATTRIBUTES:
                    cells += _information([of.get(attribute) for of in of_runs])
                yield cells

    return table(columns, rows())


def _information(of_runs: Sequence[dict | None]) -> list[str]:
    """Three cells; dashes where nothing could be found: no detection, one level, one expert."""
    known = [of for of in of_runs if of and of['mi_max'] > 0]
    if len(known) < len(of_runs):
        return [NOTHING] * 3
    mi, chance = (mean_std([of[key] for of in known])[0] for key in ('mi', 'chance'))
    return [f'{mi:.2f}', f'{chance:.2f}', f'{max(of["p_adjusted"] for of in known):.3f}']
