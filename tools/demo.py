"""Train a dense and an MoE RetinaNet on digit scenes and compare them (``make demo``).

Finished parts are reused: a second run is immediate, an interrupted one goes on. ``--fresh`` starts
anew.
"""

import argparse
import importlib.util
import shutil
import sys
import time
from pathlib import Path

if importlib.util.find_spec('mmdet_moe') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from mmdet_moe.analysis.runs import COCO_METRICS, REPOSITORY, RunResult, collect, train
from mmdet_moe.analysis.plots import plot_level_shares
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.errors import ConfigError

RUNS = {'dense': 'retinanet_dense_digits', 'MoE, soft': 'retinanet_moe_soft_digits'}
console = Console()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data', type=Path, default=REPOSITORY / 'data' / 'digit-scenes')
    parser.add_argument('--work-dir', type=Path, default=REPOSITORY / 'work_dirs' / 'demo')
    parser.add_argument('--iterations', type=int, help='shorter or longer than the configs say')
    parser.add_argument('--fresh', action='store_true', help='forget earlier trainings')
    args = parser.parse_args()
    try:
        run_demo(args)
    except ConfigError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def run_demo(args: argparse.Namespace) -> None:
    """Data, both trainings, the table."""
    start = time.time()
    if args.fresh:
        shutil.rmtree(args.work_dir, ignore_errors=True)
    console.rule('1/3 data')
    digit_scenes.generate(args.data, num_train=1000, num_val=200, size=256, seed=0)
    options = [f'data_root={args.data}', 'randomness.seed=0']
    if args.iterations:
        fields = ('train_cfg.max_iters', 'train_cfg.val_interval', 'param_scheduler.1.end')
        options += [f'{field}={args.iterations}' for field in fields]
    results = {}
    for i, (name, config) in enumerate(RUNS.items(), start=2):
        console.rule(f'{i}/3 {name}')
        work_dir = args.work_dir / config
        if collect(work_dir) is None:
            train(REPOSITORY / 'configs' / 'demo' / f'{config}.py', work_dir, options)
        results[name] = collect(work_dir)
    console.rule('result')
    console.print(result_table(results))
    for name, result in results.items():
        for layer, report in result.layers.items():
            load = ' '.join(f'{share:.2f}' for share in report['load'])
            console.print(
                f'{name}: expert load of {layer}: {load}; the pyramid level explains '
                f'{report["mi_level"]:.2f} nats of the choice'
            )
    figure = args.work_dir / 'experts_by_level.png'
    plot_level_shares(results['MoE, soft'].layers, figure)
    console.print(f'\nData: {args.data}\nCheckpoints, logs, configs: {args.work_dir}')
    console.print(f'Which expert works on which pyramid level: {figure}')
    console.print(f'Took {time.time() - start:.0f} s.')


def result_table(results: dict[str, RunResult]) -> Table:
    """One row per model."""
    table = Table()
    for column in ('model', *COCO_METRICS.values(), 's/iteration', 'active params', 'all params'):
        table.add_column(column, justify='left' if column == 'model' else 'right')
    for name, result in results.items():
        table.add_row(
            name,
            *(f'{result.metrics[metric]:.3f}' for metric in COCO_METRICS.values()),
            f'{result.seconds_per_iteration:.3f}',
            f'{result.active_parameters / 1e6:.2f} M',
            f'{result.total_parameters / 1e6:.2f} M',
        )
    return table


if __name__ == '__main__':
    main()
