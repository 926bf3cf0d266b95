"""Training runs as the tools start them, and the figures that a finished run left behind."""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope

from mmdet_moe.analysis.files import EXPERTS_FILE
from mmdet_moe.analysis.report.history import logged_scalars
from mmdet_moe.engine.hooks.expert_utilization_hook import REPORT_FILE
from mmdet_moe.engine.preflight import recorded_checkpoint, resumable_checkpoint
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import count_parameters

REPOSITORY = Path(__file__).resolve().parents[1]
#: Names in the log of CocoMetric, and how tables call them.
COCO_METRICS = {
    'coco/bbox_mAP': 'AP',
    'coco/bbox_mAP_50': 'AP50',
    'coco/bbox_mAP_s': 'AP small',
    'coco/bbox_mAP_m': 'AP medium',
    'coco/bbox_mAP_l': 'AP large',
}

_SCOPE = threading.RLock()
#: Name in the log of MMPretrain's Accuracy, in percent.
ACCURACY = 'accuracy/top1'
#: Name in the log of DispatchEntropy, in nats.
DISPATCH_ENTROPY = 'moe/dispatch_entropy'


@dataclass
class RunResult:
    """What one finished run measured.

    Attributes:
        metrics: By the names of :data:`COCO_METRICS` (of joined data sets ``'AP <name>'``), or
            ``'accuracy'``, in 0..1; and, where it was
            measured, ``'dispatch entropy'`` in nats.
        seconds_per_iteration: Median over the logged training iterations.
        active_parameters: Parameters that one item uses.
        total_parameters: All parameters.
        length: Of the training, in the unit of its loop: iterations or epochs.
        layers: The report of ``ExpertUtilizationHook`` on the validation set, by MoE layer; empty
            for a dense model.
    """

    metrics: dict[str, float]
    seconds_per_iteration: float
    active_parameters: int
    total_parameters: int
    length: int
    layers: dict[str, dict] = field(default_factory=dict)


def train(
    config: Path,
    work_dir: Path,
    options: Sequence[str] = (),
    threads: int | None = None,
    output: TextIO | None = None,
) -> None:
    """Train in a process of its own; resume what was begun.

    Args:
        config: Config file.
        work_dir: Where the run lives.
        options: ``key=value`` pairs for ``--cfg-options``.
        threads: Threads of the process, for several runs side by side; PyTorch's choice by default.
        output: Where its output goes; this terminal by default.

    Raises:
        ConfigError: If the training fails.
    """
    arguments = [str(config), '--work-dir', str(work_dir)]
    if resumable_checkpoint(work_dir) is not None:
        arguments.append('--resume')
    if options:
        arguments += ['--cfg-options', *options]
    _run_tool('train.py', arguments, threads, output)


def evaluate(
    config: Path,
    checkpoint: str,
    work_dir: Path,
    options: Sequence[str] = (),
    threads: int | None = None,
    output: TextIO | None = None,
) -> dict[str, float]:
    """Test a detector with the weights of a file, in a process of its own.

    Args:
        config: Config file.
        checkpoint: File of weights.
        work_dir: Where the log goes, which must be empty.
        options, threads, output: As in :func:`train`.

    Returns:
        By the names of :data:`COCO_METRICS`.

    Raises:
        ConfigError: If the test fails.
    """
    arguments = [str(config), checkpoint, '--work-dir', str(work_dir)]
    if options:
        arguments += ['--cfg-options', *options]
    _run_tool('test.py', arguments, threads, output)
    (log,) = work_dir.glob('*/*.json')
    return _metrics(json.loads(log.read_text()))


def analyse(
    work_dir: Path,
    threads: int | None = None,
    output: TextIO | None = None,
    options: Sequence[str] = (),
) -> tuple[Path, dict]:
    """Look at the experts of a finished run in a process of its own, or find that it was done.

    Args:
        work_dir: Where the run lives; the results go to its folder ``experts``.
        threads: As in :func:`train`.
        output: As in :func:`train`.
        options: Further ones of ``tools/analyze_experts.py``.

    Returns:
        The folder of the results, and the content of their ``experts.json``.

    Raises:
        ConfigError: If the analysis fails.
    """
    out = work_dir / 'experts'
    result = out / EXPERTS_FILE
    if not result.exists():
        (config,) = work_dir.glob('*.py')
        checkpoint = latest_checkpoint(work_dir)
        arguments = [str(config), str(checkpoint), '--out', str(out), *options]
        _run_tool('analyze_experts.py', arguments, threads, output)
    return out, json.loads(result.read_text())


def _run_tool(tool: str, arguments: list[str], threads: int | None, output: TextIO | None) -> None:
    run_process([str(REPOSITORY / 'tools' / tool)], arguments, threads, output)


def run_process(
    program: list[str], arguments: list[str], threads: int | None, output: TextIO | None
) -> None:
    """Run Python in a process of its own, in the checkout.

    Args:
        program: A file, or ``-m`` and a module.
        arguments: Its arguments.
        threads: As in :func:`train`.
        output: As in :func:`train`.

    Raises:
        ConfigError: If it fails.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment['OMP_NUM_THREADS'] = str(threads)
    status = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=output,
        stderr=output,
    ).returncode
    if status:
        where = 'above' if output is None else f'in {output.name}'
        tool, name = Path(program[-1]).name, Path(arguments[0]).name
        raise ConfigError(
            f'{tool} failed with status {status} for {name}; its messages are {where}'
        )


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The last checkpoint of a run, by MMEngine's note; None before the first one.

    Where that file is missing no earlier one stands in for it, as for a training that is resumed:
    the figures of a finished run belong to its last checkpoint alone.
    """
    recorded = recorded_checkpoint(work_dir)
    return None if recorded is None else Path(recorded)


def collect(work_dir: Path) -> RunResult | None:
    """Read the figures of a run; None if it has not finished.

    Raises:
        ConfigError: If the work directory holds more than one config.
    """
    configs = list(work_dir.glob('*.py'))
    if not configs:
        return None
    if len(configs) > 1:
        raise ConfigError(f'{work_dir} holds the runs of several configs; use one folder for each')
    cfg = Config.fromfile(configs[0])
    lines = logged_scalars(work_dir)
    # A validation's line has the time of loading, as a training's has, but no loss.
    validations = [line for line in lines if 'data_time' in line and 'loss' not in line]
    length = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs
    if not validations or validations[-1]['step'] != length:
        return None
    times = [line['time'] for line in lines if 'loss' in line and 'time' in line]
    report = work_dir / REPORT_FILE.format(mode='val')
    active, total = _parameters(cfg)
    return RunResult(
        metrics=_metrics(validations[-1]),
        seconds_per_iteration=statistics.median(times),
        active_parameters=active,
        total_parameters=total,
        length=length,
        layers=json.loads(report.read_text())['layers'] if report.exists() else {},
    )


def _metrics(validation: dict) -> dict[str, float]:
    if ACCURACY in validation:
        metrics = {'accuracy': validation[ACCURACY] / 100}
        if DISPATCH_ENTROPY in validation:
            metrics['dispatch entropy'] = validation[DISPATCH_ENTROPY]
        return metrics
    # Of several data sets, each with a prefix.
    ap = '/coco/bbox_mAP'
    if joined := {key.removesuffix(ap): validation[key] for key in validation if key.endswith(ap)}:
        return {f'AP {name}': value for name, value in joined.items()}
    # Where nothing at all was detected MMDetection logs no metric.
    return {name: validation.get(key, 0.0) for key, name in COCO_METRICS.items()}


@contextmanager
def in_scope(name: str) -> Iterator[None]:
    """MMEngine's default scope, for one thread at a time: all threads share it."""
    with _SCOPE, DefaultScope.overwrite_default_scope(name):
        yield


def _parameters(cfg: Config) -> tuple[int, int]:
    with in_scope(cfg.get('default_scope', 'mmdet')):
        return count_parameters(MODELS.build(cfg.model))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation; the latter is NaN for one value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


@contextmanager
def quiet() -> Iterator[None]:
    """Without what MMEngine's logger says of its own accord."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    try:
        yield
    finally:
        logger.setLevel(level)
