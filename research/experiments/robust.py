"""Attacks on the trained models of an experiment: does the routing change, is an expert robust?"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet_moe.analysis.attacks import ATTACKS
from mmdet_moe.errors import ConfigError
from research.experiments.classification import ClassificationExperiment
from research.experiments.experiment import Method
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.runs import REPOSITORY, latest_checkpoint, run_process

EPS = ('1/255', '8/255')
STEPS = 20
IMAGES = 500
_COLUMNS = ('clean', 'noise', 'attacked')


def _result_file(attack: str, eps: str) -> str:
    return f'attack_{attack}_{eps.replace("/", "-")}.json'


class RobustExperiment(ClassificationExperiment):
    """All finished runs of a :class:`ClassificationExperiment` under attack; trains nothing.

    What is recorded stands in the records of those runs.

    Args:
        *args, **kwargs: As of the experiment whose runs they are.
    """

    files = {
        _result_file(attack, eps): [
            *('steps', 'images', 'rows/what'),
            *(f'rows/{of}/mean' for of in _COLUMNS),
        ]
        for attack in ATTACKS
        for eps in EPS
    }

    def run(self, table_only: bool = False) -> None:
        self.check(self.task.methods)
        runs = self._runs(self.task.methods)
        finished = [run for run in runs if self._result(*run) is not None]
        if not finished:
            raise ConfigError(
                f'--work-dir: {self.work_dir} holds no finished run; train them first with '
                f'`tools/reproduce.py {self.data_set.name} --budget {self.budget.name}`'
            )
        # What is only recorded has no model to attack.
        here = [run for run in finished if self._here(*run) is not None]
        print(
            f'{len(runs)} runs: {len(here)} have a model to attack, and '
            f'{len(finished) - len(here)} are only recorded',
            flush=True,
        )
        if not table_only:
            todo = [
                self.run_dir(*run) / file
                for run in here
                for file in self.files
                if self.read(*run, file) is None
            ]
            self._in_parallel(todo, self._attack, 'attacks')
        self.write()

    def read(self, method: Method, seed: int, file: str) -> Any:
        """As of the base class; an attack with other settings than those of now is none."""
        found = super().read(method, seed, file)
        wanted = {'steps': STEPS, 'images': IMAGES}
        return found if found and wanted.items() <= found.items() else None

    def _attack(self, result: Path) -> None:
        folder = result.parent
        (config,) = folder.glob('*.py')
        _, attack, eps = result.stem.split('_')
        arguments = [
            str(config), str(latest_checkpoint(folder)), '--attack', attack, '--eps',
            eps.replace('-', '/'), '--steps', str(STEPS), '--max-images', str(IMAGES), '--out',
            str(result), '--overwrite', '--cfg-options', f'data_root={self.data}',
        ]  # fmt: skip
        with (folder / 'output.log').open('a') as log:
            tool = str(REPOSITORY / 'tools' / 'attack_experts.py')
            run_process([tool], arguments, threads=1, output=log)

    def write(self) -> None:
        parts, complete = [self.budget.headline], True
        for eps in EPS:
            found = {
                method.name: {
                    attack: [
                        result
                        for seed in self.seeds
                        if (result := self.read(method, seed, _result_file(attack, eps)))
                    ]
                    for attack in ATTACKS
                }
                for method in self.task.methods
            }
            numbers = [len(runs) for attacks in found.values() for runs in attacks.values()]
            complete &= set(numbers) == {len(self.seeds)}
            parts.append(f'eps = {eps}:\n\n{robustness_table(found)}')
        self.publish(complete, {f'robust-{self.name}': '\n\n'.join(parts)}, {})


def robustness_table(found: dict[str, dict[str, list[dict]]]) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        found: Contents of the files of ``tools/attack_experts.py`` by method and attack. All but
            the columns of AutoPGD are those of PGD.
    """
    columns = (
        'method', 'seeds', 'accuracy', 'with noise', 'PGD', 'AutoPGD', 'best expert alone',
        'worst expert alone', 'best, AutoPGD', 'other experts, noise', 'other experts, PGD',
        'routing of the clean image', 'clean image, this routing', 'routing held in the attack',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, attacks in found.items():
            pgd, auto = attacks['pgd'], attacks['apgd']
            if not pgd:
                continue
            cells = [name, str(len(pgd))]
            cells += [_cell(pgd, 'model', column) for column in _COLUMNS]
            cells += [_cell(auto, 'model'), _cell(pgd, 'alone', of=max)]
            cells += [_cell(pgd, 'alone', of=min), _cell(auto, 'alone', of=max)]
            cells += [_cell(pgd, 'changed', 'noise')]
            cells += [
                _cell(pgd, what) for what in ('changed', 'clean_routing', 'clean_image', 'held')
            ]
            yield cells

    return table(columns, rows())


def _cell(runs: Sequence[dict], what: str, column: str = 'attacked', of: Callable = max) -> str:
    """What some rows of each run say; ``of`` chooses among several."""
    values = [
        [row[column]['mean'] for row in run['rows'] if row['what'] == what and row[column]]
        for run in runs
    ]
    return mean_and_std([of(found) for found in values]) if runs and all(values) else NOTHING
