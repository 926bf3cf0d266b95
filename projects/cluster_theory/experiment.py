"""The table and the figures of the cluster mixtures (arXiv 2208.02813).

Four settings of the data, and for each a single model and a mixture of experts, linear and
non-linear. A training takes seconds, less than the start of a process, so that each of a few
processes trains many of them, one after the other; every one is what ``tools/train.py`` does with
its config and its seed.
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmdet_moe import cli
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.report.history import logged_scalars
from mmdet_moe.errors import ConfigError
from projects.cluster_theory.cluster_alignment_hook import RECORD_FILE
from projects.cluster_theory.figures import (
    plot_alignment,
    plot_dispatch_entropy,
    plot_routing_plane,
)
from research.experiments.experiment import Method, publish
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.experiments.settings import check_settings
from research.runs import latest_checkpoint, mean_std

SETTINGS = (1, 2, 3, 4)
#: Of each mixture in the published table.
RUNS = 10
RESULT_FILE = 'result.json'
CONFIGS = Path(__file__).parent / 'configs'


_LINEAR = 'model.activation=linear'
SINGLE_LINEAR = Method('single, linear', 'single', (_LINEAR, 'optim_wrapper.optimizer.lr=3e-3'))
SINGLE = Method('single, non-linear', 'single')
MIXTURE_LINEAR = Method('mixture, linear', 'mixture', (_LINEAR,))
MIXTURE = Method('mixture, non-linear', 'mixture')
TABLE = (SINGLE_LINEAR, SINGLE, MIXTURE_LINEAR, MIXTURE)

_SOFTMAX = 'model.router.gate=softmax'
# The cross-entropy of logits goes on falling below the loss at which the authors stop.
_ON_LOGITS = ('model.loss_on=logits', 'custom_hooks.1.threshold=0.0')
# Routers that are alike for all samples would send them all to the same expert.
_NO_NOISE = ('model.router.noise=False', 'model.router.init_std=1e-5')
#: What is left open by the paper, or differs between it and its authors' program: on setting 1.
VARIANTS = (
    Method('as in the table', 'mixture'),
    Method('gate: softmax', 'mixture', (_SOFTMAX,)),
    Method('loss: on logits', 'mixture', _ON_LOGITS),
    Method('gate: softmax, loss: on logits', 'mixture', (_SOFTMAX, *_ON_LOGITS)),
    Method('no noise', 'mixture', _NO_NOISE),
    Method('no noise, gate: softmax', 'mixture', (*_NO_NOISE, _SOFTMAX)),
    *(
        Method(f'load balancing: {weight:g}', 'mixture', (f'custom_hooks.3.loss.weight={weight}',))
        for weight in (1e-4, 1e-3, 1e-2)
    ),
)
#: Of the variants, and of the figures in docs/results.md; every setting has them in its folder.
VARIANTS_SETTING = 1

#: Published test accuracy in %, its standard deviation, and the dispatch entropy of the training
#: samples in nats, by setting and model.
PUBLISHED: dict[tuple[int, Method], tuple[float, float | None, float | None]] = {
    (1, SINGLE_LINEAR): (68.3, None, None),
    (1, SINGLE): (79.6, None, None),
    (1, MIXTURE_LINEAR): (93.00, 2.11, 1.300),
    (1, MIXTURE): (99.46, 0.55, 0.098),
    (2, SINGLE_LINEAR): (68.2, None, None),
    (2, SINGLE): (77.4, None, None),
    (2, MIXTURE_LINEAR): (89.49, 1.35, 1.262),
    (2, MIXTURE): (98.10, 1.56, 0.183),
    (3, SINGLE_LINEAR): (74.3, None, None),
    (3, SINGLE): (73.7, None, None),
    (3, MIXTURE_LINEAR): (95.93, 1.34, 1.160),
    (3, MIXTURE): (99.99, 0.02, 0.008),
    (4, SINGLE_LINEAR): (74.3, None, None),
    (4, SINGLE): (70.3, None, None),
    (4, MIXTURE_LINEAR): (93.30, 1.48, 1.160),
    (4, MIXTURE): (98.92, 1.18, 0.089),
}


@dataclass(frozen=True)
class Result:
    """What one finished training measured.

    Attributes:
        accuracy: On the test samples, in %.
        iterations: Length of the training.
        test_entropy: Dispatch entropy of the test samples, without noise, in nats.
        train_entropy: That of the last training batch, with the noise of the training.
        router_feature: Largest ``|⟨θ_e, v_k⟩|`` of the router's weights with a feature.
        router_centre: Largest ``|⟨θ_e, c_k⟩|`` with a centre.

    For a single model the last four are None.
    """

    accuracy: float
    iterations: int
    test_entropy: float | None = None
    train_entropy: float | None = None
    router_feature: float | None = None
    router_centre: float | None = None


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: int
    model: Method
    seed: int

    def folder(self, work_dir: Path) -> Path:
        """Where it lives."""
        return work_dir / f's{self.setting}' / self.model.key / f'seed{self.seed}'

    @property
    def is_mixture(self) -> bool:
        """Whether it has several experts, among which the samples are divided."""
        return self.model.config == 'mixture'

    @property
    def config(self) -> Path:
        """Its config file."""
        return CONFIGS / f'{self.model.config}.py'

    @property
    def options(self) -> list[str]:
        """Its ``--cfg-options``."""
        loaders = ('train', 'val', 'test')
        setting = [f'{name}_dataloader.dataset.setting=s{self.setting}' for name in loaders]
        return [f'randomness.seed={self.seed}', *setting, *self.model.options]

    @property
    def cost(self) -> float:
        """Roughly how long it takes, relative to the others."""
        costs = {SINGLE: 8.0, SINGLE_LINEAR: 2.0, MIXTURE_LINEAR: 1.5}
        return costs.get(self.model, 2.0)


def run(
    work_dir: Path,
    settings: Sequence[int] = SETTINGS,
    runs: int = RUNS,
    jobs: int = 2,
    table_only: bool = False,
) -> Path:
    """Train what is missing and write the tables and the figures; goes on where it stopped.

    Args:
        work_dir: Where the trainings live.
        settings: Of the paper, 1 to 4.
        runs: Trainings of each mixture. The published single models are one training each, and
            so are they here.
        jobs: Processes that train side by side, which share the cores.
        table_only: Train nothing.

    Returns:
        Where they were written, see :func:`~research.experiments.experiment.publish`:
        docs/results.md when all :data:`RUNS` of all settings are there.

    Raises:
        ConfigError: For a setting that there is not, if a training fails or was begun with other
            settings, and if there is nothing to write.
    """
    if runs < 1 or jobs < 1:
        raise ConfigError(f'--runs {runs} --jobs {jobs}: give at least 1')
    if not settings or len(set(settings)) < len(settings):
        raise ConfigError(f'--settings {" ".join(map(str, settings))}: give different numbers')
    if unknown := set(settings) - set(SETTINGS):
        raise ConfigError(f'--settings {sorted(unknown)}: the paper has the settings 1 to 4')
    work_dir = Path(work_dir).resolve()
    every = list(_runs(settings, runs))
    results = _finished(every, work_dir)
    # Half a training is not gone on with, so that it may have had other settings.
    for run in results:
        check_settings(run.folder(work_dir), run.config, run.options)
    if not table_only:
        todo = [run for run in every if run not in results]
        print(f'{len(every) - len(todo)} of {len(every)} trainings are finished.', flush=True)
        # The longest first, so that no process is left alone with one at the end; then one seed of
        # every cell after the other, so that what is interrupted is a table, too.
        order = sorted(todo, key=lambda run: (run.is_mixture, run.model in VARIANTS, run.seed))
        _train_all(order, work_dir, jobs)
        results = _finished(every, work_dir)
    if not results:
        raise ConfigError(f'{work_dir} holds no finished training, so there is nothing to show')
    tables = [markdown_table(results)]
    if VARIANTS_SETTING in settings:
        tables.append(variants_table(results))
    text = '\n\n'.join(tables)
    print(text)
    pictures = {setting: figures(setting, results, work_dir) for setting in settings}
    for setting, drawn in pictures.items():
        folder = work_dir / f's{setting}' / 'figures'
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawn.items():
            draw(folder / name)
    complete = runs == RUNS and len(results) == len(every) and set(settings) == set(SETTINGS)
    return publish(complete, work_dir, {'theory': text}, pictures.get(VARIANTS_SETTING, {}))


def _runs(settings: Sequence[int], runs: int) -> Iterator[Run]:
    for setting in settings:
        for model in TABLE:
            for seed in range(runs if model.config == 'mixture' else 1):
                yield Run(setting, model, seed)
    if VARIANTS_SETTING in settings:
        for model in VARIANTS[1:]:
            for seed in range(min(runs, 3)):
                yield Run(VARIANTS_SETTING, model, seed)


def _finished(runs: Sequence[Run], work_dir: Path) -> dict[Run, Result]:
    paths = {run: run.folder(work_dir) / RESULT_FILE for run in runs}
    return {r: Result(**json.loads(p.read_text())) for r, p in paths.items() if p.exists()}


def _train_all(todo: list[Run], work_dir: Path, jobs: int) -> None:
    started, done = time.time(), 0.0
    total = sum(run.cost for run in todo)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Not forked: the libraries' threads would not survive that.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(
        jobs, context, initializer=_start_process, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(train, run, work_dir): run for run in todo}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                run = futures[future]
                done += run.cost
                minutes = (time.time() - started) / 60
                print(
                    f'{number}/{len(todo)} setting {run.setting}, {run.model.name}, seed '
                    f'{run.seed}: {result.accuracy:.2f} %; {minutes:.1f} min, '
                    f'{minutes / done * (total - done):.1f} min left',
                    flush=True,
                )
        except BrokenProcessPool as error:
            raise ConfigError(
                'a process that trains was ended from outside, perhaps for want of memory; '
                'finished trainings are kept: start the command again, with a smaller --jobs'
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)


def train(run: Run, work_dir: Path) -> Result:
    """Train as ``tools/train.py`` does, in this process, and write the result.

    Raises:
        ConfigError: If the training fails.
    """
    folder = run.folder(work_dir)
    # Half a training is not worth going on with.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = [
        # MMEngine's global objects, the logger among them, go by this name.
        f'experiment_name={folder.relative_to(work_dir).as_posix().replace("/", "_")}',
        *run.options,
    ]
    log = folder / 'output.log'
    with log.open('w') as output, redirect_stdout(output), redirect_stderr(output):
        try:
            cli.run_train([str(run.config), '--work-dir', str(folder), '--cfg-options', *options])
        except SystemExit as error:
            raise ConfigError(f'the training in {folder} failed; see {log}') from error
    result = _measured(run, folder)
    write_file(folder / RESULT_FILE, (json.dumps(asdict(result), indent=2) + '\n').encode())
    return result


def _measured(run: Run, folder: Path) -> Result:
    """The result of a training from what it logged and recorded."""
    lines = logged_scalars(folder)
    (validation,) = [line for line in lines if 'accuracy/top1' in line]
    accuracy, iterations = validation['accuracy/top1'], validation['step']
    if not run.is_mixture:
        return Result(accuracy, iterations)
    with np.load(folder / RECORD_FILE) as record:
        return Result(
            accuracy,
            iterations,
            test_entropy=validation['moe/dispatch_entropy'],
            train_entropy=float(record['dispatch_entropy'][-1]),
            router_feature=float(np.abs(record['router_features'][-1]).max()),
            router_centre=float(np.abs(record['router_centres'][-1]).max()),
        )


def markdown_table(results: Mapping[Run, Result]) -> str:
    """Ours beside the published, one row for each setting and model, and what must hold.

    Args:
        results: The finished trainings.
    """
    columns = (
        'setting', 'model', 'runs', 'test accuracy (%)', 'published', 'within',
        'dispatch entropy, training', 'published', 'test, no noise',
        'router: largest with a feature / a centre',
    )  # fmt: skip
    rows = []
    for (setting, model), (mean, std, entropy) in PUBLISHED.items():
        found = _of(results, setting, model)
        if not found:
            continue
        accuracies = [result.accuracy for result in found]
        difference = mean_std(accuracies)[0] - mean
        tolerance = 2.0 if std is None else max(2 * std, 1.0)
        verdict = 'yes' if abs(difference) <= tolerance else 'no'
        rows.append(
            [
                f'S{setting}',
                model.name,
                str(len(found)),
                mean_and_std(accuracies, 2),
                f'{mean:.1f}' if std is None else f'{mean:.2f} ± {std:.2f}',
                f'{verdict}: {difference:+.2f} of ±{tolerance:.2f}',
            ]
        )
        if entropy is None:
            rows[-1] += [NOTHING] * 4
        else:
            rows[-1] += [
                mean_and_std([result.train_entropy for result in found]),
                f'{entropy:.3f}',
                mean_and_std([result.test_entropy for result in found]),
                _router(found),
            ]
    return table(columns, rows)


def variants_table(results: Mapping[Run, Result]) -> str:
    """The non-linear mixture with one thing changed, one row for each variant."""
    columns = ('variant', 'runs', 'test accuracy (%)', 'dispatch entropy, test', 'iterations')
    rows = []
    for variant in VARIANTS:
        model = MIXTURE if variant == VARIANTS[0] else variant
        if found := _of(results, VARIANTS_SETTING, model):
            iterations = [result.iterations for result in found]
            rows.append(
                [
                    variant.name,
                    str(len(found)),
                    mean_and_std([result.accuracy for result in found], 2),
                    mean_and_std([result.test_entropy for result in found]),
                    f'{min(iterations)} – {max(iterations)}',
                ]
            )
    return table(columns, rows)


def _of(results: Mapping[Run, Result], setting: int, model: Method) -> list[Result]:
    return [r for run, r in results.items() if (run.setting, run.model) == (setting, model)]


def _router(found: Sequence[Result]) -> str:
    feature = mean_std([result.router_feature for result in found])[0]
    centre = mean_std([result.router_centre for result in found])[0]
    more = sum(result.router_centre > result.router_feature for result in found)
    return f'{feature:.2f} / {centre:.2f}; centre in {more} of {len(found)}'


def figures(
    setting: int, results: Mapping[Run, Result], work_dir: Path
) -> dict[str, Callable[[Path], None]]:
    """What draws the three figures of one setting, by their names; nothing without its mixtures.

    ``theory_s<setting>_alignment.png`` and ``…_routing.png`` show the first seed.
    """
    runs = {
        model: [run for run in results if (run.setting, run.model) == (setting, model)]
        for model in (MIXTURE, MIXTURE_LINEAR)
    }
    if not all(runs.values()):
        return {}
    panels = {
        f'{model.name}: {results[found[0]].accuracy:.2f} %': _routed(found[0], work_dir)
        for model, found in runs.items()
    }
    records = {
        model.name: [_record(run, work_dir) for run in found] for model, found in runs.items()
    }
    lines = {
        name: [(record['steps'], record['dispatch_entropy']) for record in found]
        for name, found in records.items()
    }
    first = records[MIXTURE.name][0]
    clusters = first['router_centres'].shape[2]
    return {
        f'theory_s{setting}_alignment.png': partial(plot_alignment, first),
        f'theory_s{setting}_routing.png': partial(plot_routing_plane, panels),
        f'theory_s{setting}_entropy.png': lambda path: plot_dispatch_entropy(lines, path, clusters),
    }


def _record(run: Run, work_dir: Path) -> dict[str, np.ndarray]:
    with np.load(run.folder(work_dir) / RECORD_FILE) as record:
        return dict(record)


@torch.no_grad()
def _routed(run: Run, work_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the test samples: strengths of the centres (N, K), clusters (N,) and experts (N,)."""
    folder = run.folder(work_dir)
    (config,) = folder.glob('*.py')
    cfg = Config.fromfile(config)
    model, _ = load_model(cfg, str(latest_checkpoint(folder)), 'cpu')
    data = DATASETS.build(cfg.test_dataloader.dataset)
    model(data.inputs, data.labels)
    strengths = data.inputs.sum((2, 3)) @ data.centres.T
    experts = model.moe.routing.expert_ids[:, 0]
    return strengths.numpy(), data.clusters.numpy(), experts.numpy()
