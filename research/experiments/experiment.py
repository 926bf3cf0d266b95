"""Many trainings with several seeds, side by side, that resume where they stopped.

What finished runs measured is kept in :mod:`~research.experiments.records`.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmdet_moe.analysis.files import EXPERTS_FILE, write_file
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import UtilizationReport
from mmdet_moe.moe.utilization import DEAD_SHARE
from research.experiments import records
from research.experiments.markdown import mean_per_layer, replace_between_markers
from research.experiments.records import DIGEST, data_digest
from research.experiments.settings import check_settings, fingerprint
from research.runs import REPOSITORY, RunResult, analyse, collect, latest_checkpoint, train

CONFIGS = REPOSITORY / 'configs'
RESULTS = REPOSITORY / 'docs' / 'results.md'
PICTURES = REPOSITORY / 'docs' / 'images'
#: The seeds behind docs/results.md.
SEEDS = (0, 1, 2)
#: What the analysis of a run leaves in its folder.
EXPERTS = f'experts/{EXPERTS_FILE}'
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


#: In a run's folder: :func:`~research.experiments.records.data_digest` of what it is trained on.
DATA_FILE = 'data_digest.txt'
#: A method and a seed.
Run = tuple[Method, int]


class Experiment(ABC):
    """Base class: methods × seeds, trained by ``tools/train.py`` in processes of their own.

    Args:
        data: Folder of the data set.
        work_dir: Where the runs live: ``<method>/seed<seed>``.
        seeds: One run of each method for each of them, all different.
        jobs: Runs at a time, one thread each, at least 1.

    Attributes:
        is_default: Whether its settings are those of docs/results.md: if so, runs of :data:`SEEDS`
            are recorded, and a recorded one counts as finished where it is not on the disk.
        files: By name below a run's folder, what tables and pictures read of its JSON files, as
            of :func:`~research.experiments.records.pick`.
        analysis_options: Of ``tools/analyze_experts.py``.

    Raises:
        ConfigError: For seeds or jobs out of range.
    """

    is_default = True
    files: Mapping[str, Sequence[str]] = {}
    analysis_options: Sequence[str] = ()

    def __init__(self, data: Path, work_dir: Path, seeds: Sequence[int], jobs: int) -> None:
        check_amounts(seeds, jobs)
        # Trainings run from the checkout, wherever the tool was called.
        self.data, self.work_dir = data.resolve(), work_dir.resolve()
        self.seeds = list(seeds)
        self.jobs = jobs
        self.written: Path | None = None
        self._finished: dict[Run, RunResult] = {}
        self._kept: dict[Run, dict[str, Any]] = {}
        self._of_data: dict[str, Any] = {}
        self._recorded: dict[Run, dict[str, Any] | None] = {}
        self._fingerprints: dict[Run, str] = {}
        self._trained: set[Run] = set()

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its records: another one for each budget."""

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
        """Put tables and pictures into docs/ if all runs of :data:`SEEDS` are there; record them.

        Args:
            complete: Whether all runs are there, for each of the seeds.
            tables, pictures: As of :func:`publish`.
        """
        is_default = self.is_default and self._has_recorded_data()
        if is_default:
            self._write_records()
            tables = {marker: text + self._machines(text) for marker, text in tables.items()}
        complete = complete and is_default and self.seeds == list(SEEDS)
        self.written = publish(complete, self.work_dir, tables, pictures)

    def options(self, method: Method, seed: int) -> list[str]:
        """``--cfg-options`` of a run, before those of its method."""
        return [f'data_root={self.data}', f'randomness.seed={seed}']

    def start_of(self, method: Method) -> Method | None:
        """The method from whose last checkpoint, of the same seed, another one starts, if any."""
        return None

    def start_options(self, method: Method, seed: int) -> list[str]:
        """``--cfg-options`` that let a run begin with its start's checkpoint."""
        if (start := self.start_of(method)) is None:
            return []
        return [f'load_from={latest_checkpoint(self.run_dir(start, seed))}']

    def run_of(self, method: Method) -> Method:
        """The method whose runs are those of another one: that one itself."""
        return method

    def run_dir(self, method: Method, seed: int) -> Path:
        """Where a run lives."""
        return self.work_dir / self.run_of(method).key / f'seed{seed}'

    def results(self, method: Method) -> list[RunResult]:
        """The finished runs of a method."""
        found = (self._result(method, seed) for seed in self.seeds)
        return [result for result in found if result is not None]

    def _result(self, method: Method, seed: int) -> RunResult | None:
        if (here := self._here(method, seed)) is not None:
            return here
        record = self._record_of(method, seed)
        return None if record is None else RunResult(**record['result'])

    def _here(self, method: Method, seed: int) -> RunResult | None:
        """A finished run that is on the disk, with all that it left behind."""
        # Read once: the tables are written after every run, and reading one builds its model.
        run = (self.run_of(method), seed)
        if run not in self._finished and (result := collect(self.run_dir(*run))) is not None:
            self._finished[run] = result
        return self._finished.get(run)

    def read(self, method: Method, seed: int, file: str) -> Any:
        """What tables and pictures read of a file of a run, see :attr:`files`; None without it."""
        run, path = (self.run_of(method), seed), self.run_dir(method, seed) / file
        if path.exists():
            kept = self._kept.setdefault(run, {})
            kept[file] = records.pick(json.loads(path.read_text()), self.files[file])
            return kept[file]
        # A run that is here has not been analysed yet, whatever another one of its kind was.
        record = None if self._here(*run) is not None else self._record_of(*run)
        return None if record is None else record['files'].get(file)

    def analyses(self, method: Method) -> list[dict]:
        """What is read of the ``experts.json`` of a method's runs, as far as they are there."""
        found = (self.read(method, seed, EXPERTS) for seed in self.seeds)
        return [experts for experts in found if experts is not None]

    def of_data(self, name: str, read: Callable[[], Any]) -> Any:
        """What tables say of the data set, as plain JSON; as recorded where there is no data set.

        Args:
            name: Of what is said.
            read: Reads it from the data set.
        """
        if not self.data.is_dir() and name in (recorded := self.records()['data']):
            return recorded[name]
        if name not in self._of_data:
            self._of_data[name] = read()
        return self._of_data[name]

    def _has_recorded_data(self) -> bool:
        """Whether the data set is the one of the records, as far as both are known."""
        here, recorded = data_digest(self.data), self.records()['data'].get(DIGEST)
        return None in (here, recorded) or here == recorded

    @property
    def _records_file(self) -> Path:
        return records.RECORDS / f'{self.name}.json'

    def records(self) -> dict[str, dict[str, Any]]:
        """What :func:`~research.experiments.records.read_records` says of it."""
        return records.read_records(self._records_file)

    def _record_of(self, method: Method, seed: int) -> dict[str, Any] | None:
        """The record of a run with the settings of now."""
        run = (self.run_of(method), seed)
        if run not in self._recorded:
            record = self.records()['runs'].get(self._name_of(run)) if self.is_default else None
            if record is not None and not self._has_recorded_data():
                print(
                    f'The record of {self._name_of(run)} in {self._records_file} is of other data '
                    f'than those in {self.data}.',
                    flush=True,
                )
                record = None
            if record is not None and record['settings'] != self._fingerprint(*run):
                print(
                    f'{self._name_of(run)} in {self._records_file} is not used: it is of a run '
                    'with other settings.',
                    flush=True,
                )
                record = None
            self._recorded[run] = record
        return self._recorded[run]

    def _name_of(self, run: Run) -> str:
        return self.run_dir(*run).relative_to(self.work_dir).as_posix()

    def _fingerprint(self, method: Method, seed: int) -> str:
        if (method, seed) not in self._fingerprints:
            start = self.start_of(method)
            before = '' if start is None else self._fingerprint(start, seed)
            config, options = CONFIGS / f'{method.config}.py', self._all_options(method, seed)
            self._fingerprints[method, seed] = fingerprint(config, options, before)
        return self._fingerprints[method, seed]

    def _write_records(self) -> None:
        """Record the runs that are on the disk, with what the tables have read of them."""
        runs = {}
        for run, result in list(self._finished.items()):  # trainings beside this add to it
            if run[1] in SEEDS:
                on = {'trained_on': {**records.machine(), 'threads': 1, 'jobs': self.jobs}}
                runs[self._name_of(run)] = {
                    'settings': self._fingerprint(*run),
                    'result': asdict(result),
                    'files': self._kept.get(run, {}),
                    **(on if run in self._trained else {'recorded_on': records.machine()}),
                }
        if runs:
            of_data, digest = dict(self._of_data), data_digest(self.data)
            if digest is not None and self.records()['runs'].keys() <= runs.keys():
                of_data[DIGEST] = digest  # which is nothing that others could have been told of
            records.add_records(self._records_file, runs, of_data)

    def _machines(self, text: str) -> str:
        """Where the seeds were trained, if a table says too little without it."""
        seeds: dict[str, set[int]] = {}
        for name, record in self.records()['runs'].items():
            seed = int(name.rpartition('/seed')[2])
            if seed in self.seeds and 'trained_on' in record:
                on = record['trained_on']
                kind = on['device'] + ('' if on.get('bfloat16', True) else ' (without bfloat16)')
                seeds.setdefault(kind, set()).add(seed)
        in_float32 = 'mixed precision' in text and any('without' in kind for kind in seeds)
        if len(seeds) < 2 and not in_float32:
            return ''
        places = (f'{", ".join(map(str, sorted(of)))} on {kind}' for kind, of in seeds.items())
        unlike = 'on unlike machines' if len(seeds) > 1 else 'so'
        return f'\n\nSeeds were trained {unlike}: {"; ".join(places)}.'

    def train(self, methods: Iterable[Method], analysed: Sequence[Method] = ()) -> None:
        """Train those runs of some methods that are not finished, and before what they start from.

        Args:
            methods: What is trained.
            analysed: Whose runs are looked at right after their training, so that the records of
                those are whole that were finished before an interruption.

        Raises:
            ConfigError: If a run fails.
        """
        runs = self._runs(methods)
        todo = [run for run in runs if self._result(*run) is None]
        recorded = len(runs) - len(todo) - sum(self._here(*run) is not None for run in runs)
        note = (
            f', {recorded} of them by the records in {self._records_file} (move it away to train '
            'them again)'
            if recorded
            else ''
        )
        if recorded and DIGEST not in self.records()['data']:
            note += '; these do not tell their data, for which those of --data are taken'
        print(f'{len(runs) - len(todo)} of {len(runs)} runs are finished{note}.', flush=True)
        self._train_here(todo, analysed)

    def _train_here(self, runs: Iterable[Run], analysed: Sequence[Method] = ()) -> None:
        """Train the runs that are not on the disk, recorded or not."""
        todo = [run for run in runs if self._here(*run) is None]
        self._train_starts(todo)

        def work(run: Run) -> None:
            self._train_one(*run)
            if run[0] in analysed:
                self._analyse_one(run)

        self._in_parallel(todo, work, 'runs')

    def _train_starts(self, runs: Iterable[Run]) -> None:
        """Train what some runs start from, where it is not on the disk."""
        starts = [(start, seed) for m, seed in runs if (start := self.start_of(m)) is not None]
        if starts:
            self._train_here(dict.fromkeys(starts))

    def check(self, methods: Iterable[Method]) -> None:
        """Refuse runs of some methods that were begun with other settings, or other data.

        Raises:
            ConfigError: With the first field that differs.
        """
        digest = data_digest(self.data)
        for method, seed in self._runs(methods):
            folder, options = self.run_dir(method, seed), self._all_options(method, seed)
            check_settings(folder, CONFIGS / f'{method.config}.py', options)
            noted = folder / DATA_FILE
            if digest is not None and noted.exists() and noted.read_text() != digest:
                raise ConfigError(
                    f'{folder} holds a run on other data than those in {self.data}; move it away, '
                    'or choose another --work-dir'
                )

    def _runs(self, methods: Iterable[Method]) -> list[Run]:
        return [(method, seed) for seed in self.seeds for method in methods]

    def _all_options(self, method: Method, seed: int) -> list[str]:
        return [*self.options(method, seed), *method.options]

    def _train_one(self, method: Method, seed: int) -> None:
        work_dir, start = self.run_dir(method, seed), self.start_of(method)
        if start is not None and latest_checkpoint(self.run_dir(start, seed)) is None:
            raise ConfigError(
                f'{self.run_dir(start, seed)} holds no checkpoint for {method.name} to start '
                'from; move it away, so that it is trained again'
            )
        work_dir.mkdir(parents=True, exist_ok=True)
        if (digest := data_digest(self.data)) is not None:
            write_file(work_dir / DATA_FILE, digest.encode())
        self._trained.add((method, seed))  # before it is there, and may be recorded
        log = work_dir / 'output.log'
        with log.open('a') as output:
            options = self._all_options(method, seed)
            train(CONFIGS / f'{method.config}.py', work_dir, options, threads=1, output=output)
        if self._here(method, seed) is None:
            raise ConfigError(f'{work_dir} did not finish; see {log}')

    def analyse(self, methods: Iterable[Method]) -> None:
        """Look at the experts of all runs of some methods, trained again if only recorded.

        Raises:
            ConfigError: If a run or an analysis fails.
        """
        todo = [run for run in self._runs(methods) if self.read(*run, EXPERTS) is None]
        self._train_here(todo)
        self._in_parallel(todo, self._analyse_one, 'analyses')

    def _analyse_one(self, run: Run) -> None:
        work_dir = self.run_dir(*run)
        with (work_dir / 'output.log').open('a') as log:
            analyse(work_dir, threads=1, output=log, options=self.analysis_options)

    def _in_parallel(self, todo: Sequence[Item], work: Callable[[Item], None], name: str) -> None:
        calls = [partial(work, item) for item in todo]
        work_through(ThreadPoolExecutor(self.jobs), calls, name, self.write)


def work_through(
    pool: Executor,
    calls: Sequence[Callable[[], None]],
    name: str = 'runs',
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Make all calls in a pool, and say how many are done and how long the others will take.

    If one fails, those that have not begun are left out: they would only delay the message.
    """
    started = time.time()
    with pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                minutes = (time.time() - started) / 60
                left = minutes / done * (len(calls) - done)
                print(
                    f'{done}/{len(calls)} {name}, {minutes:.0f} min, {left:.0f} min left',
                    flush=True,
                )
                after_each()
        except BaseException:
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


def per_layer(runs: Sequence[RunResult], key: str) -> str:
    """``a / b``: a figure of each MoE layer on the validation set, mean over the seeds."""
    return mean_per_layer([[report[key] for report in run.layers.values()] for run in runs])


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
