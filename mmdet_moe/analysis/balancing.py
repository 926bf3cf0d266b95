"""``tools/plot_balancing.py``: how the experts were used over one or several trainings."""

import argparse
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdet_moe.analysis.report.balancing import LayerHistory, write_balancing
from mmdet_moe.analysis.report.figures import folder_of
from mmdet_moe.analysis.report.history import read_history
from mmdet_moe.analysis.report.names import layer_names, run_names
from mmdet_moe.cli import check_folder
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.surgery.report import in_columns
from mmdet_moe.moe.utilization import FEW_EXPERTS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Draw how the experts of one or several trainings were used, side by side, '
        'from their logs: who gets how much, who is masked, who dies, and what inference would do.'
    )
    parser.add_argument(
        'runs', nargs='+', type=Path, metavar='RUN', help='work directory of a training'
    )
    parser.add_argument(
        '--out', type=Path, required=True, metavar='DIR', help='folder for the figures'
    )
    parser.add_argument(
        '--names', nargs='+', metavar='NAME', help='what to call the runs (default: their folders)'
    )
    parser.add_argument('--layer', metavar='NAME', help='this MoE layer only (default: all)')
    parser.add_argument(
        '--steps',
        nargs='+',
        type=int,
        default=[],
        metavar='N',
        help='iterations of the stepwise figure; of each the nearest logged one is drawn',
    )
    parser.add_argument(
        '--until', type=int, metavar='N', help='draw the first N iterations only, a closer look'
    )
    parser.add_argument('--gif', action='store_true', help='an animation of all iterations, too')
    return parser.parse_args(argv)


def plot_balancing(args: argparse.Namespace) -> list[Path]:
    """Draw, and print what came of each run.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The files written.

    Raises:
        ConfigError: For a mistake in the command line, or a run without the logs.
    """
    names = _names(args)
    if wrong := [step for step in args.steps if step < 1]:
        raise ConfigError(f'--steps: {wrong[0]} is no training iteration; they count from 1')
    if args.until is not None and (late := [step for step in args.steps if step > args.until]):
        raise ConfigError(f'--steps: {late[0]} is after --until={args.until}; raise that')
    check_folder(args.out, '--out')
    layers: dict[str, dict[str, LayerHistory]] = {}
    for name, run in zip(names, args.runs, strict=True):
        for layer, history in _read(run, args.until).items():
            layers.setdefault(layer, {})[name] = LayerHistory.from_history(history)
    if args.layer is not None:
        if args.layer not in layers:
            raise ConfigError(f'--layer={args.layer}: the runs have {", ".join(layers)}')
        layers = {args.layer: layers[args.layer]}
    lines = [('layer', 'run', 'iterations', 'at the end', 'dead since iteration')]
    paths, words = [], layer_names(layers)
    for layer, runs in layers.items():
        folder = folder_of(args.out, layer)
        paths += write_balancing(words[layer], runs, folder, args.steps, args.gif)
        for name, run in runs.items():
            since = [f'{step} (expert {e})' for e, step in enumerate(run.dead_since()) if step]
            lines.append((layer, name, str(run.steps[-1]), run.verdict(), ', '.join(since) or '-'))
    print(in_columns(lines), '', *paths, sep='\n')
    return paths


def _names(args: argparse.Namespace) -> list[str]:
    """One name for each run, all different."""
    folders = [run.resolve() for run in args.runs]
    if twice := [str(run) for run, count in Counter(folders).items() if count > 1]:
        raise ConfigError(f"RUN: '{twice[0]}' is given twice; name each run once")
    if args.names is None:
        return run_names(folders)
    if len(args.names) != len(folders) or len(set(args.names)) != len(folders):
        raise ConfigError(
            f'--names: give {len(folders)} different names, one for each run, not {args.names}'
        )
    return args.names


def _read(run: Path, until: int | None) -> dict[str, dict[str, list]]:
    """By layer, as :func:`~mmdet_moe.analysis.report.history.read_history`."""
    if not run.is_dir():
        raise ConfigError(f"RUN: there is no folder '{run}'; name the work directory of a training")
    history = read_history(run)
    if history is None:
        raise ConfigError(
            f"RUN: '{run}' has no loads of experts in */vis_data/scalars.json; name the work "
            'directory of a training with ExpertUtilizationHook, which every balancing fragment '
            f'brings, and MoE layers of at most {FEW_EXPERTS} experts'
        )
    if until is None:
        return history
    first = min(kinds['step'][0] for kinds in history.values())
    if first > until:
        raise ConfigError(
            f"--until={until}: the first loads in '{run}' were logged at iteration {first}; raise "
            'it, or train with a smaller interval=... of ExpertUtilizationHook'
        )
    return {
        layer: {
            kind: values[: bisect_right(kinds['step'], until)] for kind, values in kinds.items()
        }
        for layer, kinds in history.items()
        if kinds['step'][0] <= until
    }
