"""Attacks on the trained models of an experiment: does the routing change, is an expert robust?"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmdet_moe.analysis.attacks import ATTACKS
from mmdet_moe.errors import ConfigError
from research.experiments.classification import ClassificationExperiment
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.runs import REPOSITORY, latest_checkpoint, run_process

EPS = ('1/255', '8/255')
STEPS = 20
IMAGES = 500


class RobustExperiment(ClassificationExperiment):
    """All finished runs of a :class:`ClassificationExperiment` under attack; trains nothing.

    Args:
        *args, **kwargs: As of the experiment whose runs they are.
    """

    def run(self, table_only: bool = False) -> None:
        self.check(self.task.methods)
        runs = self._runs(self.task.methods)
        finished = [self.run_dir(*run) for run in runs if self._result(*run) is not None]
        if not finished:
            raise ConfigError(
                f'--work-dir: {self.work_dir} holds no finished run; train them first with '
                f'`tools/reproduce.py {self.data_set.name} --budget {self.budget.name}`'
            )
        print(f'{len(finished)} of {len(runs)} runs are finished and attacked.', flush=True)
        if not table_only:
            every = [
                _result_file(f, attack, e) for f in finished for attack in ATTACKS for e in EPS
            ]
            self._in_parallel(
                [path for path in every if not path.exists()], self._attack, 'attacks'
            )
        self.write()

    def _attack(self, result: Path) -> None:
        folder = result.parent
        (config,) = folder.glob('*.py')
        _, attack, eps = result.stem.split('_')
        arguments = [
            str(config), str(latest_checkpoint(folder)), '--attack', attack, '--eps',
            eps.replace('-', '/'), '--steps', str(STEPS), '--max-images', str(IMAGES), '--out',
            str(result), '--cfg-options', f'data_root={self.data}',
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
                        json.loads(path.read_text())
                        for seed in self.seeds
                        if (path := _result_file(self.run_dir(method, seed), attack, eps)).exists()
                    ]
                    for attack in ATTACKS
                }
                for method in self.task.methods
            }
            numbers = [len(runs) for attacks in found.values() for runs in attacks.values()]
            complete &= set(numbers) == {len(self.seeds)}
            parts.append(f'eps = {eps}:\n\n{robustness_table(found)}')
        name = f'robust-{self.data_set.name}-{self.budget.name}'
        self.publish(complete, {name: '\n\n'.join(parts)}, {})


def _result_file(folder: Path, attack: str, eps: str) -> Path:
    return folder / f'attack_{attack}_{eps.replace("/", "-")}.json'


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
            cells += [_cell(pgd, 'model', column) for column in ('clean', 'noise', 'attacked')]
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
