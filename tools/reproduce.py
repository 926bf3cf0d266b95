"""Reproduce the tables of docs/results.md.

``tools/reproduce.py digit-scenes`` trains every balancing method of the demo model with several
seeds, and looks at the experts of each. It resumes where it stopped, and rewrites the tables after
every finished run.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec('mmdet_moe') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import Config
from torch import Tensor

from mmdet_moe.analysis.files import EXPERTS_FILE
from mmdet_moe.analysis.interventions import ALL
from mmdet_moe.analysis.levels import information_on_level, positives_per_level
from mmdet_moe.analysis.plots import plot_specialisation
from mmdet_moe.analysis.runs import (
    REPOSITORY,
    RunResult,
    analyse,
    collect,
    latest_checkpoint,
    mean_std,
    train,
)
from mmdet_moe.cli import apply_data_root
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.errors import ConfigError, exit_on_user_error
from mmdet_moe.moe import UtilizationReport
from mmdet_moe.moe.utilization import DEAD_SHARE

RESULTS = REPOSITORY / 'docs' / 'results.md'
PICTURE = REPOSITORY / 'docs' / 'images' / 'specialisation.png'


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    config: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the folder of its runs."""
        return self.name.replace(' ', '_').replace(',', '').replace(':', '')


PRETRAINING = Method('pretraining', 'retinanet_pretrain_digits')
METHODS = (
    Method('dense', 'retinanet_dense_digits'),
    Method('soft: importance', 'retinanet_moe_soft_digits'),
    Method('soft: KL', 'retinanet_moe_soft_kl_digits'),
    Method('hard: relative', 'retinanet_moe_hard_digits'),
    Method('hard: mean', 'retinanet_moe_hard_mean_digits'),
    Method('loss-free bias', 'retinanet_moe_loss_free_digits'),
    Method('no balancing', 'retinanet_moe_unbalanced_digits'),
)
MOE_METHODS = METHODS[1:]
#: Drawn in docs/results.md: the one with auxiliary losses, the two with masks, and none.
PICTURED = (METHODS[1], METHODS[3], METHODS[4], METHODS[6])
DECISION_WEIGHTS = tuple(
    Method(
        f'soft: importance, {weight}',
        'retinanet_moe_soft_digits',
        (f'model.bbox_head.decision_weight={weight}',),
    )
    for weight in ('uniform', 'area', 'positives')
)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    digits = commands.add_parser('digit-scenes', help='balancing methods on the demo data')
    digits.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    digits.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each')
    digits.add_argument('--data', type=Path, default=REPOSITORY / 'data' / 'digit-scenes')
    digits.add_argument(
        '--work-dir', type=Path, default=REPOSITORY / 'work_dirs' / 'reproduce' / 'digit-scenes'
    )
    digits.add_argument('--table-only', action='store_true', help='train nothing')
    args = parser.parse_args()
    # Trainings run from the checkout, wherever the tool was called.
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    with exit_on_user_error():
        digit_scenes_tables(args)


def digit_scenes_tables(args: argparse.Namespace) -> None:
    """Train what is missing and write both tables."""
    digit_scenes.generate(args.data, num_train=1000, num_val=200, size=256, seed=0)
    if not args.table_only:
        # Every seed has its own pretrained model, from which all of its methods start.
        run_all(args, [(PRETRAINING, seed) for seed in args.seeds])
        run_all(args, [(method, seed) for seed in args.seeds for method in unique_methods()])
        analyse_all(args)
    write_tables(args)


def run_all(args: argparse.Namespace, runs: list[tuple[Method, int]]) -> None:
    """Train those of the runs that are not finished, several at a time."""
    todo = [run for run in runs if collect(run_dir(args.work_dir, *run)) is None]
    print(f'{len(runs) - len(todo)} of {len(runs)} runs are finished.', flush=True)

    def train_one(run: tuple[Method, int]) -> None:
        work_dir = _run(args, *run)
        if collect(work_dir) is None:
            raise ConfigError(f'{work_dir} did not finish; see {work_dir / "output.log"}')

    _in_parallel(args, todo, train_one, 'runs')


def analyse_all(args: argparse.Namespace) -> None:
    """Look at the experts of all runs of the main table."""

    def analyse_one(work_dir: Path) -> None:
        with (work_dir / 'output.log').open('a') as log:
            analyse(work_dir, threads=1, output=log)

    folders = [run_dir(args.work_dir, m, seed) for m in MOE_METHODS for seed in args.seeds]
    todo = [folder for folder in folders if not (folder / 'experts' / EXPERTS_FILE).exists()]
    _in_parallel(args, todo, analyse_one, 'analyses')


def _in_parallel(
    args: argparse.Namespace, todo: list, work: Callable[[Any], None], name: str
) -> None:
    started = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(work, item) for item in todo]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            minutes = (time.time() - started) / 60
            rest = minutes / done * (len(todo) - done)
            print(f'{done}/{len(todo)} {name}, {minutes:.0f} min, {rest:.0f} min left', flush=True)
            write_tables(args)


def unique_methods() -> Iterator[Method]:
    """All methods; the decision weights reuse the run of the default one."""
    yield from METHODS
    default = METHODS[1]
    yield from (m for m in DECISION_WEIGHTS if _canonical(m) != default)


def _canonical(method: Method) -> Method:
    # 'positives' is the default of MoERetinaHead, so that row is the run of the main table.
    return METHODS[1] if method == DECISION_WEIGHTS[-1] else method


def run_dir(work_dir: Path, method: Method, seed: int) -> Path:
    """Where a run lives."""
    return work_dir / _canonical(method).key / f'seed{seed}'


def _run(args: argparse.Namespace, method: Method, seed: int) -> Path:
    work_dir = run_dir(args.work_dir, method, seed)
    options = [f'data_root={args.data}', f'randomness.seed={seed}', *method.options]
    if method != PRETRAINING:
        options.append(f'load_from={latest_checkpoint(run_dir(args.work_dir, PRETRAINING, seed))}')
    config = REPOSITORY / 'configs' / 'demo' / f'{method.config}.py'
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / 'output.log').open('a') as log:
        train(config, work_dir, options, threads=1, output=log)
    return work_dir


def write_tables(args: argparse.Namespace) -> None:
    """Rewrite the generated parts of docs/results.md."""
    cfg = Config.fromfile(REPOSITORY / 'configs' / 'demo' / f'{METHODS[0].config}.py')
    apply_data_root(cfg, str(args.data))
    objects = positives_per_level(cfg)
    for marker, methods in (('digit-scenes', METHODS), ('decision-weights', DECISION_WEIGHTS)):
        results = {
            method.name: [
                result
                for seed in args.seeds
                if (result := collect(run_dir(args.work_dir, method, seed))) is not None
            ]
            for method in methods
        }
        replace_between_markers(RESULTS, marker, markdown_table(results, objects))
    write_specialisation(args)


def write_specialisation(args: argparse.Namespace) -> None:
    """The table and the picture of what the experts learned, from the analyses that are there."""
    found: dict[str, list[dict]] = {}
    pictures: dict[str, dict] = {}
    for method in MOE_METHODS:
        for seed in args.seeds:
            path = run_dir(args.work_dir, method, seed) / 'experts' / EXPERTS_FILE
            if path.exists():
                experts = json.loads(path.read_text())
                found.setdefault(method.name, []).append(experts)
                if method in PICTURED and seed == args.seeds[0]:
                    pictures[method.name] = experts
    if found:
        replace_between_markers(RESULTS, 'specialisation', specialisation_table(found))
    if len(pictures) == len(PICTURED):
        plot_specialisation(pictures, PICTURE)


def specialisation_table(found: dict[str, list[dict]]) -> str:
    """Mean over the seeds, ``cls / reg`` for the two MoE layers, one row per method.

    Args:
        found: Contents of ``experts.json`` by method.
    """
    columns = (
        'method', 'seeds', 'size of objects', 'of detections', 'largest p', 'class', 'AP',
        'best expert alone', 'worst expert alone', 'all alike', 'at random', 'both at random',
    )  # fmt: skip
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    for name, runs in found.items():
        cells = [name, str(len(runs))]
        cells += [
            _over_layers(runs, lambda layer, _: _association(layer, 'objects', 'size_coco')['mi']),
            _over_layers(
                runs, lambda layer, _: _association(layer, 'detections', 'size_coco')['mi']
            ),
            f'{max(_p_values(runs)):.3f}',
            _over_layers(runs, lambda layer, _: _association(layer, 'objects', 'class')['mi']),
            _mean_std([run['metrics']['AP'] for run in runs]),
            _over_layers(runs, lambda _, changed: max(changed['only']), 3),
            _over_layers(runs, lambda _, changed: min(changed['only']), 3),
            _over_layers(runs, lambda _, changed: changed['equal'][0], 3),
            _over_layers(runs, lambda _, changed: changed['random'][0], 3),
            f'{mean_std([_changed(run, ALL)["random"][0] for run in runs])[0]:.3f}',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _association(layer: dict, source: str, attribute: str) -> dict:
    return layer['associations'][source][attribute]


def _p_values(runs: list[dict]) -> Iterator[float]:
    for run in runs:
        for layer in run['layers'].values():
            for source in ('objects', 'detections'):
                yield _association(layer, source, 'size_coco')['p_value']


def _changed(run: dict, layer: str) -> dict[str, list[float]]:
    """AP after the interventions on a layer, by kind."""
    found: dict[str, list[float]] = {}
    for entry in run['interventions']:
        if entry['layer'] == layer:
            found.setdefault(entry['kind'], []).append(entry['metrics']['AP'])
    return found


def _over_layers(runs: list[dict], value: Callable[[dict, dict], float], digits: int = 2) -> str:
    cells = []
    for name in runs[0]['layers']:
        values = [value(run['layers'][name], _changed(run, name)) for run in runs]
        cells.append(f'{mean_std(values)[0]:.{digits}f}')
    return ' / '.join(cells)


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
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    for name, runs in results.items():
        if not runs:
            continue
        cells = [name, str(len(runs))]
        cells += [_mean_std([run.metrics[m] for run in runs]) for m in columns[2:7]]
        if runs[0].layers:
            cells += [
                _per_layer(runs, lambda report: report['load_cv2']),
                _dead(runs),
                _per_layer(runs, lambda report: report['mi_input']),
                _per_layer(runs, lambda report: report['mi_level']),
                _per_layer(
                    runs, lambda report: information_on_level(report['level_shares'], objects)
                ),
            ]
        else:
            cells += ['–'] * 5
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _mean_std(values: list[float], digits: int = 3) -> str:
    mean, std = mean_std(values)
    return f'{mean:.{digits}f} ± {std:.{digits}f}' if len(values) > 1 else f'{mean:.{digits}f}'


def _per_layer(runs: list[RunResult], value) -> str:
    """``cls / reg``: the mean over the seeds for each MoE layer."""
    means = [mean_std([value(run.layers[layer]) for run in runs])[0] for layer in runs[0].layers]
    return ' / '.join(f'{mean:.2f}' for mean in means)


def _dead(runs: list[RunResult]) -> str:
    reports = [UtilizationReport(**report) for run in runs for report in run.layers.values()]
    dead = sum(len(report.dead_experts(DEAD_SHARE)) for report in reports)
    return f'{dead} of {sum(report.num_experts for report in reports)}'


def replace_between_markers(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``.

    Raises:
        ConfigError: If the file has no such markers.
    """
    begin, end = f'<!-- {marker}:begin -->', f'<!-- {marker}:end -->'
    content = path.read_text()
    if begin not in content or end not in content:
        raise ConfigError(f'{path} lacks the markers {begin} and {end} around its table')
    head, rest = content.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f'{head}{begin}\n{text}\n{end}{tail}')


if __name__ == '__main__':
    main()
