"""Many trainings with several seeds, side by side, that resume where they stopped."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmdet_moe.analysis.files import EXPERTS_FILE, write_file
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import UtilizationReport
from mmdet_moe.moe.utilization import DEAD_SHARE
from research.experiments.markdown import replace_between_markers
from research.experiments.settings import check_settings
from research.runs import REPOSITORY, RunResult, analyse, collect, train

CONFIGS = REPOSITORY / 'configs'
RESULTS = REPOSITORY / 'docs' / 'results.md'
PICTURES = REPOSITORY / 'docs' / 'images'
#: The seeds behind docs/results.md.
SEEDS = (0, 1, 2)
Item = TypeVar('Item')


def folder_name(name: str) -> str:
    """What tables call a thing, as the name of a folder."""
    return name.replace(' ', '_').replace(',', '').replace(':', '')


def check_amounts(seeds: Sequence[int], jobs: int) -> None:
    """Refuse what no experiment can be run with.

    Args:
        seeds: Of the runs of each kind.
        jobs: Runs at a time.

    Raises:
        ConfigError: For no seeds, seeds that repeat, and fewer jobs than 1.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f'--seeds {" ".join(map(str, seeds))}: give different numbers')
    if jobs < 1:
        raise ConfigError(f'--jobs {jobs}: give at least 1')


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: As the table calls it.
        config: Its config below ``configs/``, without the suffix.
        options: ``key=value`` pairs for ``--cfg-options``.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the folder of its runs."""
        return folder_name(self.name)


class Experiment(ABC):
    """Base class: methods × seeds, trained by ``tools/train.py`` in processes of their own.

    Args:
        data: Folder of the data set.
        work_dir: Where the runs live: ``<method>/seed<seed>``.
        seeds: One run of each method for each of them, all different.
        jobs: Runs at a time, one thread each, at least 1.

    Raises:
        ConfigError: For seeds or jobs out of range.
    """

    #: Of ``tools/analyze_experts.py``.
    analysis_options: Sequence[str] = ()

    def __init__(self, data: Path, work_dir: Path, seeds: Sequence[int], jobs: int) -> None:
        check_amounts(seeds, jobs)
        # Trainings run from the checkout, wherever the tool was called.
        self.data, self.work_dir = data.resolve(), work_dir.resolve()
        self.seeds = list(seeds)
        self.jobs = jobs
        self.written: Path | None = None
        self._finished: dict[Path, RunResult] = {}

    @abstractmethod
    def run(self, table_only: bool = False) -> None:
        """Train what is missing, look at it, and write the tables.

        Args:
            table_only: Write the tables of what is there.
        """

    @abstractmethod
    def write(self) -> None:
        """Rewrite the tables and pictures from what is there, with :meth:`publish`."""

    def publish(
        self, complete: bool, tables: dict[str, str], pictures: dict[str, Callable[[Path], None]]
    ) -> None:
        """Put tables and pictures into docs/ if all runs of :data:`SEEDS` are there.

        Args:
            complete: Whether all runs are there, for each of the seeds.
            tables, pictures: As of :func:`publish`.
        """
        complete = complete and self.seeds == list(SEEDS)
        self.written = publish(complete, self.work_dir, tables, pictures)

    def options(self, method: Method, seed: int) -> list[str]:
        """``--cfg-options`` of a run, before those of its method."""
        return [f'data_root={self.data}', f'randomness.seed={seed}']

    def run_dir(self, method: Method, seed: int) -> Path:
        """Where a run lives."""
        return self.work_dir / method.key / f'seed{seed}'

    def results(self, method: Method) -> list[RunResult]:
        """The finished runs of a method."""
        found = (self._result(method, seed) for seed in self.seeds)
        return [result for result in found if result is not None]

    def _result(self, method: Method, seed: int) -> RunResult | None:
        # Read once: the tables are written after every run, and reading one builds its model.
        folder = self.run_dir(method, seed)
        if folder not in self._finished and (result := collect(folder)) is not None:
            self._finished[folder] = result
        return self._finished.get(folder)

    def analyses(self, method: Method) -> list[dict]:
        """Contents of the ``experts.json`` of a method's runs, as far as they are there."""
        paths = (self.run_dir(method, seed) / 'experts' / EXPERTS_FILE for seed in self.seeds)
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def train(self, methods: Iterable[Method]) -> None:
        """Train those runs of some methods that are not finished.

        Raises:
            ConfigError: If a run fails.
        """
        runs = self._runs(methods)
        todo = [run for run in runs if self._result(*run) is None]
        print(f'{len(runs) - len(todo)} of {len(runs)} runs are finished.', flush=True)
        self._in_parallel(todo, lambda run: self._train_one(*run), 'runs')

    def check(self, methods: Iterable[Method]) -> None:
        """Refuse runs of some methods that were begun with other settings.

        Raises:
            ConfigError: With the first field that differs.
        """
        for method, seed in self._runs(methods):
            options = self._all_options(method, seed)
            check_settings(self.run_dir(method, seed), CONFIGS / f'{method.config}.py', options)

    def _runs(self, methods: Iterable[Method]) -> list[tuple[Method, int]]:
        return [(method, seed) for seed in self.seeds for method in methods]

    def _all_options(self, method: Method, seed: int) -> list[str]:
        return [*self.options(method, seed), *method.options]

    def _train_one(self, method: Method, seed: int) -> None:
        work_dir = self.run_dir(method, seed)
        work_dir.mkdir(parents=True, exist_ok=True)
        log = work_dir / 'output.log'
        with log.open('a') as output:
            options = self._all_options(method, seed)
            train(CONFIGS / f'{method.config}.py', work_dir, options, threads=1, output=output)
        if self._result(method, seed) is None:
            raise ConfigError(f'{work_dir} did not finish; see {log}')

    def analyse(self, methods: Iterable[Method]) -> None:
        """Look at the experts of all runs of some methods.

        Raises:
            ConfigError: If an analysis fails.
        """
        folders = [self.run_dir(*run) for run in self._runs(methods)]
        todo = [folder for folder in folders if not (folder / 'experts' / EXPERTS_FILE).exists()]

        def analyse_one(work_dir: Path) -> None:
            with (work_dir / 'output.log').open('a') as log:
                analyse(work_dir, threads=1, output=log, options=self.analysis_options)

        self._in_parallel(todo, analyse_one, 'analyses')

    def _in_parallel(self, todo: Sequence[Item], work: Callable[[Item], None], name: str) -> None:
        started = time.time()
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work, item) for item in todo]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    minutes = (time.time() - started) / 60
                    rest = minutes / done * (len(todo) - done)
                    print(
                        f'{done}/{len(todo)} {name}, {minutes:.0f} min, {rest:.0f} min left',
                        flush=True,
                    )
                    self.write()
            except BaseException:
                # What has not begun would only delay the message.
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def publish(
    complete: bool,
    work_dir: Path,
    tables: dict[str, str],
    pictures: dict[str, Callable[[Path], None]],
) -> Path:
    """Put tables and pictures into docs/, or into a work directory while runs are missing.

    So what is published is never replaced by less.

    Args:
        complete: Whether all runs are there.
        work_dir: Gets a folder ``tables`` if not.
        tables: Markdown by the name of its markers in docs/results.md.
        pictures: What draws a picture into a file, by the file's name.

    Returns:
        docs/results.md, or that folder.
    """
    folder = PICTURES if complete else work_dir / 'tables'
    folder.mkdir(parents=True, exist_ok=True)
    for marker, text in tables.items():
        if complete:
            replace_between_markers(RESULTS, marker, text)
        else:
            write_file(folder / f'{marker}.md', f'{text}\n'.encode())
    for name, draw in pictures.items():
        draw(folder / name)
    return RESULTS if complete else folder


def dead_experts(runs: Sequence[RunResult]) -> str:
    """How many experts get next to nothing on the validation set, of how many, over all seeds."""
    reports = [UtilizationReport(**report) for run in runs for report in run.layers.values()]
    dead = sum(len(report.dead_experts(DEAD_SHARE)) for report in reports)
    return f'{dead} of {sum(report.num_experts for report in reports)}'


def changed_by(experts: dict, layer: str, metric: str) -> dict[str, list[float]]:
    """The metric after the interventions on a layer, by kind.

    Args:
        experts: Content of an ``experts.json``.
        layer: Name of an MoE layer, or :data:`~mmdet_moe.analysis.interventions.ALL`.
        metric: ``'AP'`` or ``'accuracy'``.
    """
    found: dict[str, list[float]] = {}
    for entry in experts['interventions']:
        if entry['layer'] == layer:
            found.setdefault(entry['kind'], []).append(entry['metrics'][metric])
    return found
