"""A trained model, the images that it is measured on, and what a change does to its metric."""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdet_moe.analysis.data import SPLITS, AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.recorder import predictions_of
from mmdet_moe.analysis.records.contents import BoxRecords, concatenated
from mmdet_moe.analysis.statistics.evaluation import ClassificationMetrics, DetectionMetrics
from mmdet_moe.cli import fail, load_config, set_loader_defaults
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.engine.preflight import check_config, check_trained_classes
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.surgery.report import in_columns
from mmdet_moe.progress import progress_bar

#: Parts of the metrics that are tables of their own.
_PARTS = {'per_group': 'group', 'per_superclass': 'super-class', 'per_class': 'class'}


def add_options(parser: argparse.ArgumentParser, max_images: int | None = None) -> None:
    """The options of every tool that changes a model and measures it.

    Args:
        parser: Of the tool.
        max_images: Default of ``--max-images``; None: all.
    """
    parser.add_argument('--overwrite', action='store_true', help='replace what is there')
    parser.add_argument('--split', choices=SPLITS, default='val', help='which images (val)')
    parser.add_argument(
        '--max-images',
        type=int,
        metavar='N',
        default=max_images,
        help=f'so many images, drawn at random, always the same ({max_images or "all"})',
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1, … (default: a GPU if there is one)')
    add_cfg_options(parser)


def run_tool(work: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run a tool; a mistake of the user is one line.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the data or the command line.
    """
    try:
        work(args)
    except Exception as error:
        fail(error, running=False)


def read_config(args: argparse.Namespace, config: str, checkpoint: str) -> Config:
    """A config that fits the data on the disk.

    Args:
        args: With the options of :func:`add_options`.
        config: File.
        checkpoint: File or address, which has to be there.

    Raises:
        ConfigError: For a mistake in any of them, or in the data.
    """
    if args.max_images is not None and args.max_images < 1:
        raise ConfigError(f'--max-images={args.max_images} must be at least 1')
    cfg = load_config(config, args.cfg_options)
    check_config(cfg, args.split, checkpoint)
    set_loader_defaults(cfg)
    return cfg


def load_trained(args: argparse.Namespace) -> tuple[Config, nn.Module, dict]:
    """The config, its model with the weights of the checkpoint, and what that says of itself.

    Args:
        args: With ``config``, ``checkpoint`` and the options of :func:`add_options`.

    Raises:
        ConfigError: For a mistake in any of them, or in the data.
    """
    cfg = read_config(args, args.config, args.checkpoint)
    return cfg, *load_model(cfg, args.checkpoint, args.device)


def images_of(args: argparse.Namespace, cfg: Config, meta: dict) -> AnalysisData:
    """The images of ``--split``.

    Args:
        args: With the options of :func:`add_options`.
        cfg: The config.
        meta: What the checkpoint says of itself.

    Raises:
        ConfigError: If there are none, or their classes are not those of the training.
    """
    data = AnalysisData(cfg, args.split, args.max_images)
    check_trained_classes(meta, data.dataset.metainfo, f'{args.split}_dataloader.dataset')
    return data


def write_checkpoint(path: Path, state: dict[str, Tensor], meta: dict) -> None:
    """Write weights and what is said of them.

    What trains on, such as the optimizer's state, is about the weights as they were, and not there.
    """
    content = io.BytesIO()
    torch.save({'meta': meta, 'state_dict': state}, content)
    write_file(path, content.getvalue())


def measure(model: nn.Module, data: AnalysisData, name: str = 'images') -> dict:
    """:func:`metrics_of` what a model predicts, see :func:`predict`."""
    return metrics_of(predict(model, data, name), data)


@torch.no_grad()
def predict(model: nn.Module, data: AnalysisData, name: str = 'images') -> BoxRecords | np.ndarray:
    """The predictions for all images of a data set: boxes, or classes, int32 (len(data),).

    Args:
        model: A classifier or a detector, in evaluation mode.
        data: The data set.
        name: What the progress bar is called.
    """
    parts: list[BoxRecords | np.ndarray] = []
    done = 0  # a bar that is not shown does not count
    with progress_bar(total=len(data), desc=name, unit=' images') as bar:
        for batch in data.batches():
            results = model.test_step(batch)
            parts.append(predictions_of(range(done, done + len(results)), results))
            done += len(results)
            bar.update(len(results))
            if done == len(data):
                break
    return concatenated(parts)


def metrics_of(found: BoxRecords | np.ndarray, data: AnalysisData) -> dict:
    """The metrics of predictions.

    Args:
        found: As of :func:`predict`.
        data: The data set.

    Returns:
        As :class:`ClassificationMetrics` and :class:`DetectionMetrics` do; and, of data sets that
        have them, ``per_group``: accuracy or AP on the images of each group, see
        :attr:`AnalysisData.groups`, and ``per_superclass``: its mean over the classes of each.
    """
    if isinstance(found, BoxRecords):
        main, of_detections = 'AP', DetectionMetrics(data, len(data))
        metrics = of_detections(found)
        per_group = {g: of_detections(found, images) for g, images in data.groups.items()}
    else:
        main, labels = 'accuracy', np.array([data.label(i) for i in range(len(data))])
        metrics = ClassificationMetrics(data.classes, labels)(found)
        per_group = {
            group: ClassificationMetrics(data.classes, labels[images])(found[images])
            for group, images in data.groups.items()
        }
    if per_group:
        metrics['per_group'] = {group: values[main] for group, values in per_group.items()}
    per_class = list(metrics['per_class'].values())
    if data.superclasses:
        metrics['per_superclass'] = {
            group: _mean([per_class[i] for i in classes])
            for group, classes in data.superclasses.items()
        }
    return metrics


def comparison(before: dict, after: dict) -> str:
    """The table of the metrics before and after a change, see :func:`metrics_of`."""
    lines = [('', 'before', 'after', 'change')]
    for name, value in before.items():
        if name not in _PARTS:
            lines.append(_line(name, value, after[name]))
    for part, title in _PARTS.items():
        for name, value in before.get(part, {}).items():
            lines.append(_line(f'{title} {name}', value, after[part][name]))
    return in_columns(lines)


def main_metric(metrics: dict) -> tuple[str, float]:
    """The name and the value of the metric that counts most: AP or accuracy."""
    name = 'AP' if 'AP' in metrics else 'accuracy'
    return name, metrics[name]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _line(name: str, before: float | None, after: float | None) -> tuple[str, ...]:
    if before is None or after is None:
        return (name, '-', '-', '-')
    return (name, f'{before:.4f}', f'{after:.4f}', f'{after - before:+.4f}')
