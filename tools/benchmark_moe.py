"""Measure the layers of this package against what else one could write.

suites:
  ops        rows to the experts and back: against index_add_, and against plain copies
  conv       convolutions as experts: against other ways, and against dense convolutions
  scaling    the cost grows with k, and not with E
  retinanet  a training iteration of the MoE RetinaNet: against dense ones
  mumoe      multilinear layers: against linear ones, and against the formula written down; entmax15
  overhead   one expert against the dense layer; what a layer costs besides its experts
  analysis   the statistics of tools/analyze_experts.py: against a plain test of the same images
  explorer   size and loading time of the report for a large data set (only if asked for; Chromium)
  auto       how good the choice of ConvExperts(impl='auto') is (only if asked for)

All alternatives of a table take turns in one process, after their results have been compared. It
takes about ten minutes on two cores, which should have nothing else to do.

`--compare` (`make bench`) measures the suites up to `analysis` at fewer shapes, and says which
ratios moved since the figures in research/benchmarks/figures/; `--update` replaces these.

Exit status 1: an alternative computes something else; 2: a mistake in the command line; 3: with
--fail, a ratio moved to the slower side, or is no longer measured.
"""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.errors import ConfigError, exit_on_user_error
from research.benchmarks.conv import ConvShape, run_auto, run_conv, run_scaling
from research.benchmarks.environment import environment
from research.benchmarks.harness import SECONDS_PER_COMPARISON, Benchmark, WrongResult
from research.benchmarks.moved import (
    FOLDER,
    NOT_MEASURED,
    Figure,
    figures_of,
    interval_of_median,
    moves,
    read_figures,
    summary_of,
    table_of,
    write_figures,
)
from research.benchmarks.mumoe import MuMoEShape, run_mumoe
from research.benchmarks.ops import run_ops

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows: Items of the suite ``ops``, on a CPU and on a GPU.
        channels: Values of each.
        conv: Shapes of the suite ``conv``.
        scaling: Those of the suite ``scaling``, which differ in E.
        image_size: Height and width in the suite ``retinanet``.
        mumoe: The numbers of the :class:`MuMoEShape` of the suite ``mumoe``.
        batch: Images of the suite ``overhead``.
        analysis: Images of the suite ``analysis``.
        explorer: Images of the suite ``explorer``.
        auto: How many shapes the suite ``auto`` draws.
        repeats: Rounds of every table; None: as time allows.
        seconds: For the rounds of every table.
    """

    rows: tuple[int, int] = (16_384, 65_536)
    channels: int = 256
    conv: tuple[ConvShape, ...] = (
        ConvShape(16, 256, 32, 8),
        ConvShape(16, 256, 16, 8),
        ConvShape(8, 256, 64, 4),
        ConvShape(64, 64, 32, 10),
    )
    scaling: tuple[ConvShape, ...] = tuple(ConvShape(64, 64, 32, e) for e in (4, 8, 16, 32, 64))
    image_size: int = 256
    mumoe: tuple[int, ...] = (64, 196, 512, 256, 64)
    batch: int = 8
    analysis: int = 96
    explorer: int = 5000
    auto: int = 60
    repeats: int | None = None
    seconds: float = SECONDS_PER_COMPARISON


FULL = Sizes()
QUICK = Sizes(conv=(FULL.conv[1], FULL.conv[3]), analysis=24, explorer=200, auto=6, repeats=3)
COMPARED = Sizes(
    conv=QUICK.conv, scaling=(FULL.scaling[0], FULL.scaling[-1]), analysis=24, seconds=5.0
)


def _late(name: str, size: str) -> Callable[[Benchmark, Sizes], None]:
    """``run_<name>`` of its module, imported only to be run: MMDetection takes seconds."""

    def run_suite(bench: Benchmark, sizes: Sizes) -> None:
        module = importlib.import_module(f'research.benchmarks.{name}')
        getattr(module, f'run_{name}')(bench, getattr(sizes, size))

    return run_suite


SUITES: dict[str, Callable[[Benchmark, Sizes], None]] = {
    'ops': lambda b, sizes: run_ops(b, sizes.rows[b.device.type == 'cuda'], sizes.channels),
    'conv': lambda b, sizes: run_conv(b, sizes.conv),
    'scaling': lambda b, sizes: run_scaling(b, sizes.scaling),
    'retinanet': _late('retinanet', 'image_size'),
    'mumoe': lambda b, sizes: run_mumoe(b, MuMoEShape(*sizes.mumoe)),
    'overhead': _late('overhead', 'batch'),
    'analysis': _late('statistics', 'analysis'),
    'explorer': _late('explorer', 'explorer'),
    'auto': lambda b, sizes: run_auto(b, sizes.auto),
}
DEFAULT_SUITES = ('ops', 'conv', 'scaling', 'retinanet', 'mumoe', 'overhead', 'analysis')


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'suites', nargs='*', metavar='SUITE', help=f'default: {" ".join(DEFAULT_SUITES)}'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='float32 on a CPU, bfloat16 on a GPU')
    parser.add_argument('--channels-last', action='store_true', help='maps of that memory format')
    parser.add_argument('--threads', type=int, help="default: PyTorch's choice")
    parser.add_argument(
        '--repeats', type=int, help='rounds of every table; default: 7 to 50, as time allows'
    )
    parser.add_argument(
        '--quick', action='store_true', help='fewer shapes, 3 rounds: not for figures to quote'
    )
    parser.add_argument(
        '--compare', action='store_true', help='say what moved since the kept figures'
    )
    parser.add_argument(
        '--reference',
        type=Path,
        metavar='FILE',
        help='the kept figures; default: research/benchmarks/figures/<device>.json',
    )
    parser.add_argument(
        '--fail', action='store_true', help='exit status 3 if a ratio is slower or missing'
    )
    parser.add_argument(
        '--update', action='store_true', help='keep the figures of this run; say what moved'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures there')
    args = parser.parse_args(argv)
    with exit_on_user_error():
        _check_arguments(args)
        try:
            if not _compares(args):
                run(args)
                return
            then = _kept_figures(args)
            command = shlex.join(['tools/benchmark_moe.py', *(argv or sys.argv[1:])])
            compare(args, then, run(args), command)
        except WrongResult as error:
            print(f'error: {error}', file=sys.stderr)
            raise SystemExit(1) from None


def _compares(args: argparse.Namespace) -> bool:
    return args.compare or args.update


def _check_arguments(args: argparse.Namespace) -> None:
    if unknown := [suite for suite in args.suites if suite not in SUITES]:
        raise ConfigError(f"there is no suite '{unknown[0]}'; choose from {', '.join(SUITES)}")
    for option in ('threads', 'repeats'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f'--{option} must be at least 1, got {value}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('--device cuda: PyTorch finds no GPU here; use --device cpu')
    if args.device == 'cpu' and args.dtype == 'float16':
        raise ConfigError('--dtype float16 is for GPUs; use bfloat16 or float32 on a CPU')
    if _compares(args):
        if args.quick:
            raise ConfigError('--quick has too few rounds to compare; leave it')
        if args.channels_last:
            raise ConfigError('--channels-last is not what the kept figures had; leave it')
        if args.repeats is not None and interval_of_median(range(args.repeats)) is None:
            raise ConfigError(f'--repeats {args.repeats} are too few rounds to compare; leave it')
        if unknown := [suite for suite in args.suites if suite not in DEFAULT_SUITES]:
            raise ConfigError(f"the suite '{unknown[0]}' is not compared; leave it")
    if args.update and args.suites:
        raise ConfigError('--update keeps the figures of all suites; name none')
    if args.fail and (args.update or not args.compare):
        raise ConfigError('--fail belongs to --compare, without --update')
    if args.reference is not None and not _compares(args):
        raise ConfigError('--reference belongs to --compare and --update')
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f'--json: there is no folder {args.json.resolve().parent}')
    if args.json is not None and args.json.is_dir():
        raise ConfigError(f'--json: {args.json} is a folder; name a file')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the suites, write the file after each, and return what is in it."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = args.dtype or ('float32' if args.device == 'cpu' else 'bfloat16')
    sizes = QUICK if args.quick else COMPARED if _compares(args) else FULL
    repeats = args.repeats or sizes.repeats
    # In this order: the suite `ops` starts with the memory as it is.
    suites = [suite for suite in SUITES if suite in (args.suites or DEFAULT_SUITES)]
    bench = Benchmark(
        device, DTYPES[dtype], repeats, sizes.seconds, _compares(args), args.channels_last
    )
    report = {
        'environment': environment(device),
        'settings': {
            'device': args.device,
            'dtype': dtype,
            'channels_last': args.channels_last,
            'repeats': repeats,
            'quick': args.quick,
        },
        'suites': bench.suites,
    }
    print(_headline(report))
    for i, suite in enumerate(suites, 1):
        if bench.only_watched:
            print(f'suite {i} of {len(suites)}: {suite}', flush=True)
        bench.start(suite)
        if args.device == 'cpu' and suite != 'ops':
            report['settings']['memory_kept'] = keep_large_blocks()
        SUITES[suite](bench, sizes)
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + '\n')
    targets = [target for results in bench.suites.values() for target in results['targets']]
    if targets and not bench.only_watched:
        print(f'\n{sum(target["met"] for target in targets)} of {len(targets)} targets are met.')
    return report


def _reference(args: argparse.Namespace) -> Path:
    return args.reference or FOLDER / f'{args.device}.json'


def _kept_figures(args: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    path = _reference(args)
    if not args.update:
        return read_figures(path)
    if args.reference is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f'--reference: there is no folder {path.resolve().parent}')
    return read_figures(path) if path.exists() else ({}, [])


def compare(
    args: argparse.Namespace,
    then: tuple[dict[str, Any], list[Figure]],
    report: dict[str, Any],
    command: str,
) -> None:
    """Print what moved, keep the figures if asked for, and end with status 3 if asked for."""
    conditions, figures = then
    found = moves(figures, figures_of(report), report['suites'])
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table_of(found))
    print(summary_of(found, conditions, report))
    print(f'Not measured: {NOT_MEASURED}.')
    if args.update:
        write_figures(_reference(args), report, command)
        print(f'These figures are kept in {_reference(args)}.')
    elif args.fail and any(move.fails for move in found):
        raise SystemExit(3)


def _headline(report: dict) -> str:
    facts, settings = report['environment'], report['settings']
    (kernels,) = (entry for entry in facts['kernels'] if entry['device'] == settings['device'])
    return (
        f'{facts["device"]}, {facts["threads"]} CPU threads, {settings["dtype"]}; '
        f'PyTorch {facts["versions"]["torch"]}; ops: '
        f'{"compiled" if kernels["native"] else "reference"} ({kernels["detail"]})'
    )


if __name__ == '__main__':
    main()
