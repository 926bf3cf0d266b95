"""Train a dense and two MoE RetinaNets on digit scenes, compare them, and look at the experts.

This is what ``make demo`` runs. Finished parts are reused: a second run is immediate, an
interrupted one goes on. ``--fresh`` starts anew. What trainings and the analysis print goes to the
file output.log of each, and with ``--verbose`` to the terminal.
"""

import argparse
import io
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import mmcv
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmdet_moe.analysis.files import REPORT_FILE
from mmdet_moe.analysis.report.verdict import spoken
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.errors import ConfigError, exit_on_user_error
from research.plots import plot_overview
from research.runs import (
    COCO_METRICS,
    REPOSITORY,
    RunResult,
    analyse,
    collect,
    latest_checkpoint,
    quiet,
    train,
)

PRETRAINING = 'retinanet_pretrain_digits'
NUM_PICTURES = 4
RUNS = {
    'dense': 'retinanet_dense_digits',
    'MoE, soft': 'retinanet_moe_soft_digits',
    'MoE, equal cost': 'retinanet_moe_equal_digits',
}
#: Where a training or an analysis has got to, in what it prints.
STEP = re.compile(rb'\[ *(\d+)/(\d+)\]|(\d+)/(\d+) \[')
# A pipe has no width, and the table has nine columns.
console = Console(width=None if sys.stdout.isatty() else 130)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--data', type=Path, default=REPOSITORY / 'data' / 'digit-scenes')
    parser.add_argument('--work-dir', type=Path, default=REPOSITORY / 'work_dirs' / 'demo')
    parser.add_argument('--images', type=int, default=1000, help='training images (1000)')
    parser.add_argument('--iterations', type=int, help='shorter or longer than the configs say')
    parser.add_argument('--fresh', action='store_true', help='forget earlier trainings')
    parser.add_argument(
        '--verbose', action='store_true', help='print all that trainings and the analysis print'
    )
    args = parser.parse_args()
    # Trainings run from the checkout, wherever the tool was called.
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    with exit_on_user_error(), quiet():
        run_demo(args)


def run_demo(args: argparse.Namespace) -> None:
    """Data, the trainings, the table."""
    start = time.time()
    if args.iterations is not None and args.iterations < 2:
        raise ConfigError(f'--iterations {args.iterations}: give at least 2')
    if args.fresh:
        shutil.rmtree(args.work_dir, ignore_errors=True)
    console.rule('1/6 data')
    try:
        digit_scenes.generate(
            args.data, num_train=args.images, num_val=max(1, args.images // 5), size=256, seed=0
        )
    except ConfigError as error:
        raise ConfigError(f'{error} (here: choose another folder with --data)') from error
    console.rule('2/6 pretraining of a dense RetinaNet, the common start')
    run_once(args, PRETRAINING)
    pretrained = latest_checkpoint(args.work_dir / PRETRAINING)
    results = {}
    for i, (name, config) in enumerate(RUNS.items(), start=3):
        console.rule(f'{i}/6 {name}: trained on from there')
        results[name] = run_once(
            args, config, f'load_from={pretrained}', *schedule(args.iterations)
        )
    console.print(result_table(results))
    moe = args.work_dir / RUNS['MoE, soft']
    console.rule('6/6 what the experts of the MoE learned')
    with output_of(moe, args.verbose, 'analysis') as output:
        folder, experts = analyse(moe, output=output)
    for line in spoken(experts['verdict'], args.verbose):
        console.print(line, markup=False, highlight=False)
    images = sorted((args.data / 'val2017').iterdir())[:NUM_PICTURES]
    figure = args.work_dir / 'overview.png'
    plot_overview(draw_detections(moe, images), results['MoE, soft'].layers, figure)
    console.print(f'\nData: {args.data}\nCheckpoints, logs, configs: {args.work_dir}')
    console.print(f'Detections, and which expert works on which pyramid level: {figure}')
    console.print(f'Expert Explorer, to open in a browser: {folder / REPORT_FILE}')
    console.print(f'Took {time.time() - start:.0f} s.')


def schedule(iterations: int | None) -> Sequence[str]:
    """Options by which the rate falls to 0 at the end of so many iterations."""
    if iterations is None:
        return ()
    warm_up = min(20, iterations // 2)
    ends = f'0.end={warm_up}', f'1.begin={warm_up}', f'1.end={iterations}'
    return [f'param_scheduler.{end}' for end in ends]


def run_once(args: argparse.Namespace, config: str, *options: str) -> RunResult:
    """Train unless that has been done, and read the figures."""
    work_dir = args.work_dir / config
    result = collect(work_dir)
    if result is not None and args.iterations not in (None, result.length):
        raise ConfigError(
            f'{work_dir} holds a run of {result.length} iterations, not {args.iterations}; '
            'forget it with --fresh, or choose another folder with --work-dir'
        )
    if result is not None:
        console.print(f'Finished before, reused: {work_dir} (--fresh starts anew)')
    else:
        options = (f'data_root={args.data}', 'randomness.seed=0', *options)
        if args.iterations:
            options += (
                f'train_cfg.max_iters={args.iterations}',
                f'train_cfg.val_interval={args.iterations}',
            )
        with output_of(work_dir, args.verbose, 'training') as output:
            path = REPOSITORY / 'configs' / 'demo' / f'{config}.py'
            train(path, work_dir, options, output=output)
        result = collect(work_dir)
    return result


@contextmanager
def output_of(work_dir: Path, verbose: bool, title: str) -> Iterator[TextIO | None]:
    """Where a process of the body prints: into a file, a bar on the terminal telling how far it is.

    None with ``verbose``, for this terminal.
    """
    if verbose:
        yield None
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    log, done = work_dir / 'output.log', threading.Event()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def follow() -> None:
        start = log.stat().st_size
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=None)
            while True:
                finished = done.wait(1)  # read what is there once more at the end
                steps = STEP.findall(log.read_bytes()[start:])
                if steps:
                    step, total = (int(number) for number in steps[-1] if number)
                    progress.update(task, completed=step, total=total)
                if finished:
                    return

    with log.open('a') as output:
        follower = threading.Thread(target=follow)
        follower.start()
        try:
            yield output
        finally:
            done.set()
            follower.join()


def draw_detections(work_dir: Path, images: list[Path]) -> list[np.ndarray]:
    """RGB images with what the model of a run detects in them."""
    # Heavy, and of no use to `--help`.
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS

    (config,) = work_dir.glob('*.py')
    with redirect_stdout(io.StringIO()):  # where the checkpoint is read from
        model = init_detector(str(config), str(latest_checkpoint(work_dir)), device='cpu')
    visualizer = VISUALIZERS.build(
        {**model.cfg.visualizer, 'name': 'overview', 'vis_backends': None}
    )
    visualizer.dataset_meta = model.dataset_meta
    drawn = []
    for path in images:
        image = mmcv.imread(str(path), channel_order='rgb')
        detections = inference_detector(model, image[..., ::-1])
        visualizer.add_datasample('overview', image, detections, draw_gt=False, pred_score_thr=0.4)
        drawn.append(visualizer.get_image())
    return drawn


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
