"""Small models on the features of a frozen backbone: many with several seeds, that resume."""

import json
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmdet_moe.analysis.files import write_file
from mmdet_moe.errors import ConfigError
from research.experiments.experiment import SEEDS, check_amounts, publish, work_through
from research.heads import Recipe

Kind = TypeVar('Kind')


class FeaturesExperiment(ABC, Generic[Kind]):
    """Base class: kinds of models × seeds, each trained in a process of one thread.

    Args:
        data: Folder of the data set.
        work_dir: Where features and figures live.
        seeds: One model of each kind for each of them, all different.
        jobs: Trainings at a time, at least 1.

    Attributes:
        kinds: Of models.

    Raises:
        ConfigError: For seeds or jobs out of range.
    """

    kinds: Sequence[Kind]

    def __init__(self, data: Path, work_dir: Path, seeds: Sequence[int], jobs: int) -> None:
        check_amounts(seeds, jobs)
        self.data, self.work_dir = data.resolve(), work_dir.resolve()
        self.seeds, self.jobs = list(seeds), jobs
        self.written: Path | None = None

    def run(self, table_only: bool = False) -> None:
        """Train what is missing, and write table and picture.

        Args:
            table_only: Train nothing.

        Raises:
            ConfigError: If data or weights are missing, or models were trained with other settings.
        """
        if not table_only:
            self.prepare()
            runs = [(kind, seed) for seed in self.seeds for kind in self.kinds]
            todo = [run for run in runs if self.result(*run) is None]
            print(f'{len(runs) - len(todo)} of {len(runs)} models are trained.', flush=True)
            self.in_processes([partial(self._train, *run) for run in todo], self.write)
        self.write()

    @abstractmethod
    def prepare(self) -> None:
        """Compute the features, which the processes then find, and choose recipes."""

    @abstractmethod
    def path(self, kind: Kind, seed: int) -> Path:
        """The JSON file of a model's settings and figures."""

    @abstractmethod
    def settings(self, kind: Kind) -> Mapping[str, Any]:
        """What the figures of a model depend on."""

    @abstractmethod
    def measure(self, kind: Kind, seed: int) -> Mapping[str, Any]:
        """Train a model; its figures."""

    @abstractmethod
    def write(self) -> None:
        """Table and picture of what is there, with :meth:`publish`."""

    def result(self, kind: Kind, seed: int) -> dict[str, Any] | None:
        """What a finished training has left.

        Raises:
            ConfigError: If its settings were others.
        """
        path = self.path(kind, seed)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if found['settings'] != json.loads(json.dumps(self.settings(kind))):
            raise ConfigError(
                f'{path} was made with other settings; move it away, or choose another --work-dir'
            )
        return found

    def results(self) -> dict[Kind, dict[int, dict[str, Any]]]:
        """Of the finished trainings, by kind and seed."""
        found = ((k, {s: self.result(k, s) for s in self.seeds}) for k in self.kinds)
        return {k: {s: r for s, r in by_seed.items() if r is not None} for k, by_seed in found}

    def publish(
        self,
        results: Mapping[Kind, Collection[Any]],
        tables: dict[str, str],
        pictures: dict[str, Callable[[Path], None]],
        is_default: bool = True,
    ) -> None:
        """Put tables and pictures into docs/ if all models of :data:`SEEDS` are there.

        Args:
            results: By kind those of each seed, as far as they are there.
            tables, pictures: As of :func:`~research.experiments.experiment.publish`.
            is_default: Whether the settings are those of docs/results.md.
        """
        whole = all(len(of_kind) == len(SEEDS) for of_kind in results.values())
        complete = is_default and self.seeds == list(SEEDS) and whole
        self.written = publish(complete, self.work_dir, tables, pictures)

    def in_processes(
        self, work: Sequence[Callable[[], None]], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Make all calls in processes; with one job in this one, where they share their data."""
        spawn = multiprocessing.get_context('spawn')
        pool = ThreadPoolExecutor(1) if self.jobs == 1 else ProcessPoolExecutor(self.jobs, spawn)
        work_through(pool, work, after_each=after_each)

    def _train(self, kind: Kind, seed: int) -> None:
        path = self.path(kind, seed)
        content = {'settings': self.settings(kind), **self.measure(kind, seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(content).encode())


def choose(recipes: Iterable[Recipe], judge: Callable[[Recipe], float], path: Path) -> None:
    """Write down the best recipe, for :func:`chosen`, and what was tried.

    Args:
        recipes: To choose from.
        judge: The accuracy on held-out images after a training.
        path: Of the JSON file.
    """
    tried = []
    for recipe in recipes:
        tried.append({'recipe': asdict(recipe), 'accuracy': judge(recipe)})
        print(f'{path.stem}, {recipe}: {tried[-1]["accuracy"]:.4f}', flush=True)
    best = max(tried, key=lambda entry: entry['accuracy'])
    content = {'best': best['recipe'], 'tried': tried}
    write_file(path, json.dumps(content, indent=2).encode())


def chosen(path: Path) -> Recipe:
    """The recipe that :func:`choose` found best."""
    return Recipe(**json.loads(path.read_text())['best'])
