#!/usr/bin/env python
"""Reproduce the tables and pictures of docs/results.md.

Every experiment trains several methods with several seeds and looks at the experts of each run. It
resumes where it stopped. Tables and pictures go to docs/ when all runs of the default seeds are
there, and before that to the folder ``tables`` of the work directory. What finished runs of the
default seeds and settings measured is kept in research/records/: they count as finished without
their work directory, too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.errors import exit_on_user_error
from projects.cluster_theory import experiment as theory
from research.experiments import rotate
from research.experiments.budget import CIFAR10, FASHION_MNIST
from research.experiments.classification import TASKS, ClassificationExperiment
from research.experiments.domains import TRUNKS, DomainsExperiment
from research.experiments.domains_detector import DomainsDetectorExperiment
from research.experiments.experiment import SEEDS, Experiment
from research.experiments.mumoe import MuMoEExperiment
from research.experiments.mumoe_editing import EditingExperiment
from research.experiments.on_features import FeaturesExperiment
from research.experiments.photographs import TASKS as PHOTOGRAPHS
from research.experiments.photographs import PhotographsExperiment
from research.experiments.robust import RobustExperiment
from research.experiments.scenes import DIGIT_SCENES, FASHION_SCENES, ScenesExperiment
from research.experiments.sizes import METHODS, SizesExperiment
from research.experiments.yolox import YOLOX, YoloxExperiment
from research.runs import REPOSITORY

#: The data of the experiments with rotated images, by command.
ROTATED = {'rotate': FASHION_MNIST, 'rotate-cifar10': CIFAR10}
#: The experiments whose trained models are attacked, by command.
ATTACKED = {'robust': 'cifar100', 'robust-fashion-mnist': 'fashion-mnist'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    _add(commands, 'digit-scenes', 'balancing methods of a RetinaNet on the demo data')
    scenes = _add(
        commands, 'fashion-scenes', 'the same on scenes with clothes from Fashion-MNIST, in short'
    )
    scenes.add_argument(
        '--source',
        type=Path,
        default=Path(os.environ.get('FASHION_MNIST_ROOT', REPOSITORY / 'data' / 'fashion-mnist')),
        help='folder of the four idx files (by default FASHION_MNIST_ROOT, or data/fashion-mnist)',
    )
    sizes = _add(
        commands,
        'size-beyond-level',
        'heads whose experts may specialise by size beyond the level, on the demo data',
        data='digit-scenes',
    )
    sizes.add_argument(
        '--methods',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f'some of {", ".join(repr(method.name) for method in METHODS)} (all)',
    )
    sizes.add_argument(
        '--quick',
        action='store_true',
        help='few generated images (--data is not read), and of '
        'the first seed few iterations, to see that it works',
    )
    budgets = {name: task.budgets for name, task in TASKS.items()}
    by_name = {
        name: _add(commands, name, f'balancing methods of a ResNet-18 on {title}')
        for name, title in (('fashion-mnist', 'Fashion-MNIST'), ('cifar100', 'CIFAR-100'))
    }
    for name, attacked in ATTACKED.items():
        budgets[name] = TASKS[attacked].budgets
        by_name[name] = _add(
            commands, name, f'attacks on the trained models of `{attacked}`', data=attacked
        )
        by_name[name].set_defaults(work_dir=REPOSITORY / 'work_dirs' / 'reproduce' / attacked)
    cluster = commands.add_parser(
        'theory', help='the table of "Towards Understanding the MoE Layer", on generated clusters'
    )
    cluster.add_argument('--settings', type=int, nargs='+', default=list(theory.SETTINGS))
    cluster.add_argument(
        '--runs', type=int, default=theory.RUNS, help='of each mixture (%(default)s)'
    )
    _add_common(cluster, 'theory', 'trainings at a time, which share the cores')
    for name, data_set in ROTATED.items():
        budgets[name] = rotate.BUDGETS[data_set]
        by_name[name] = _add(
            commands,
            name,
            'a mixture of networks against a single one: is this image of '
            f'{"CIFAR-10" if data_set == CIFAR10 else "Fashion-MNIST"} rotated?',
            data=data_set.name,
        )
    _add(
        commands,
        'mumoe',
        'heads of CIFAR-100 on frozen features: μMoE and sparse experts against a linear layer',
        data='cifar100',
    )
    _add(
        commands,
        'mumoe-editing',
        'expert editing against a spurious mark, with classes of CIFAR-100',
        data='cifar100',
    )
    for trunk, what in (('domains', 'pooled features'), ('domains-maps', 'maps of features')):
        domains = _add(
            commands,
            trunk,
            f'one classifier for CIFAR-100 and Fashion-MNIST on frozen {what}: which experts win?',
            data='cifar100',
        )
        domains.add_argument(
            '--fashion-mnist',
            type=Path,
            default=Path(os.environ.get('FASHION_MNIST_ROOT', REPOSITORY / 'data/fashion-mnist')),
            help='folder of Fashion-MNIST (by default FASHION_MNIST_ROOT, or data/fashion-mnist)',
        )
    _add(commands, 'domains-detector', 'one detector for unlike data sets: which experts win?')
    for name, (data, what) in {
        'voc': ('voc2007', 'balancing methods of a RetinaNet on photographs of 20 classes'),
        'persons': ('persons', 'do experts know the size of persons beyond the level?'),
        'yolox': ('coco-subset', 'a trained YOLOX-nano becomes sparse: what do its experts learn?'),
    }.items():
        epochs = {**PHOTOGRAPHS, YOLOX.name: YOLOX}[name].epochs
        _add(commands, name, what, data=data).add_argument(
            '--epochs', type=int, help=f'of every training ({epochs})'
        )
    for command, choices in budgets.items():
        texts = '; '.join(f'{name}: {budget.text}' for name, budget in choices.items())
        by_name[command].add_argument('--budget', choices=tuple(choices), default='cpu', help=texts)
    return parser.parse_args(argv)


def _add(
    commands: argparse._SubParsersAction, name: str, description: str, data: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description)
    parser.add_argument('--seeds', type=int, nargs='+', default=list(SEEDS))
    data = data or name
    variable = f'{data.upper().replace("-", "_")}_ROOT'
    parser.add_argument(
        '--data',
        type=Path,
        default=Path(os.environ.get(variable, REPOSITORY / 'data' / data)),
        help=f'folder of the data set (by default {variable}, or data/{data})',
    )
    _add_common(parser, name, 'runs at a time, one thread each')
    return parser


def _add_common(parser: argparse.ArgumentParser, name: str, jobs: str) -> None:
    parser.add_argument('--jobs', type=int, default=2, help=f'{jobs} (%(default)s)')
    parser.add_argument(
        '--work-dir', type=Path, default=REPOSITORY / 'work_dirs' / 'reproduce' / name
    )
    parser.add_argument('--table-only', action='store_true', help='train nothing')


def experiment(args: argparse.Namespace) -> Experiment | FeaturesExperiment:
    """The experiment that the command line asks for."""
    common = (args.data, args.work_dir, args.seeds, args.jobs)
    if args.command in TASKS:
        task = TASKS[args.command]
        return ClassificationExperiment(task, task.budgets[args.budget], *common)
    if args.command in ATTACKED:
        task = TASKS[ATTACKED[args.command]]
        return RobustExperiment(task, task.budgets[args.budget], *common)
    if args.command in ROTATED:
        data_set = ROTATED[args.command]
        return rotate.RotateExperiment(data_set, rotate.BUDGETS[data_set][args.budget], *common)
    if args.command in TRUNKS:
        return DomainsExperiment(*common, args.fashion_mnist, TRUNKS[args.command])
    if args.command == 'domains-detector':
        return DomainsDetectorExperiment(*common)
    if args.command in PHOTOGRAPHS:
        return PhotographsExperiment(PHOTOGRAPHS[args.command], *common, epochs=args.epochs)
    if args.command == YOLOX.name:
        return YoloxExperiment(*common, epochs=args.epochs)
    if args.command == 'mumoe':
        return MuMoEExperiment(*common)
    if args.command == 'mumoe-editing':
        return EditingExperiment(*common)
    if args.command == 'size-beyond-level':
        return SizesExperiment(*common, methods=args.methods, quick=args.quick)
    if args.command == 'fashion-scenes':
        return ScenesExperiment(FASHION_SCENES, *common, source=args.source)
    return ScenesExperiment(DIGIT_SCENES, *common)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    with exit_on_user_error():
        if args.command == 'theory':
            written = theory.run(
                args.work_dir, args.settings, args.runs, args.jobs, args.table_only
            )
        else:
            chosen = experiment(args)
            chosen.run(args.table_only)
            written = chosen.written
        print(f'Tables and pictures: {written}')


if __name__ == '__main__':
    main()
