"""``tools/edit_experts.py``: an edited checkpoint, and what the edits change."""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import DictAction
from torch import nn
from tqdm import tqdm

from mmdet_moe.analysis.data import SPLITS, AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.recorder import predictions_of
from mmdet_moe.analysis.records.contents import BoxRecords, concatenated
from mmdet_moe.analysis.statistics.evaluation import ClassificationMetrics, DetectionMetrics
from mmdet_moe.cli import fail, load_config, set_loader_defaults
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import Edit, edit_experts
from mmdet_moe.moe.surgery.report import in_columns

#: What an edit may say, and how it is read.
_FIELDS: dict[str, Callable[[str], object]] = {
    'layer': str,
    'expert': int,
    'output': lambda text: None if text == 'all' else int(text),
    'scale': float,
    'add': float,
    'zero': {'true': True, 'True': True}.__getitem__,
}
#: Parts of the metrics that are tables of their own.
_PARTS = {'per_group': 'group', 'per_superclass': 'super-class', 'per_class': 'class'}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Change what single experts of a trained model contribute to single outputs, '
        'without training; show what that does to the metric, and write the edited checkpoint.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--edit',
        action='append',
        required=True,
        metavar='layer=NAME,expert=N,output=O,scale=S',
        help="one change, may be repeated: of expert N's contribution to output O (or "
        'output=all), by scale=S (c -> S · c), add=A (c -> c + A) or zero=true',
    )
    parser.add_argument(
        '--out', type=Path, required=True, metavar='FILE', help='the edited checkpoint'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace what is there')
    parser.add_argument('--split', choices=SPLITS, default='val', help='which images (val)')
    parser.add_argument('--max-images', type=int, metavar='N', help='the first N images only')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, … (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override fields of the config; data_root=DIR moves every path below the old one',
    )
    return parser.parse_args(argv)


def run_editing(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/edit_experts.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the data or the command line.
    """
    try:
        edit_checkpoint(parse(argv))
    except Exception as error:
        fail(error, running=False)


def edit_checkpoint(args: argparse.Namespace) -> tuple[dict, dict]:
    """Edit a checkpoint, measure it, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The metrics before and after, see :func:`measure`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line.
    """
    edits = [parse_edit(text) for text in args.edit]
    _check(args)
    cfg = load_config(args.config, args.cfg_options)
    check_config(cfg, args.split, args.checkpoint)
    set_loader_defaults(cfg)
    model, meta = load_model(cfg, args.checkpoint, args.device)
    with edit_experts(model, edits):  # first, for it complains before the images are predicted
        data = AnalysisData(cfg, args.split, args.max_images)
        state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        after = measure(model, data, 'edited')
    before = measure(model, data, 'as it was')
    content = io.BytesIO()
    # What trains on, such as the optimizer's state, is about the weights as they were.
    meta = {**meta, 'edits': [*meta.get('edits', ()), *map(str, edits)]}
    torch.save({'meta': meta, 'state_dict': state}, content)
    write_file(args.out, content.getvalue())
    print('', *edits, '', _table(before, after), sep='\n')
    print(f'\nEdited checkpoint: {args.out}')
    return before, after


def parse_edit(text: str) -> Edit:
    """An edit as it is written on the command line.

    Args:
        text: ``layer=head.fc,expert=3,output=2,scale=0``.

    Raises:
        ConfigError: If it is none.
    """
    fields = {}
    for part in text.split(','):
        name, _, value = part.strip().partition('=')
        if name not in _FIELDS or name in fields:
            problem = 'repeats' if name in fields else 'has the unknown field'
            raise ConfigError(f'--edit {text}: it {problem} {name!r}; known are {list(_FIELDS)}')
        try:
            fields[name] = _FIELDS[name](value)
        except (ValueError, KeyError):
            numbers = dict.fromkeys(('scale', 'add'), 'a number')
            kind = {**numbers, 'zero': "'true'"}.get(name, 'an integer')
            more = " or 'all'" if name == 'output' else ''
            raise ConfigError(f'--edit {text}: {name}={value} must be {kind}{more}') from None
    if missing := [name for name in ('layer', 'expert', 'output') if name not in fields]:
        raise ConfigError(f'--edit {text}: give {" and ".join(missing)}, too')
    return Edit(**fields)


def _check(args: argparse.Namespace) -> None:
    if args.max_images is not None and args.max_images < 1:
        raise ConfigError(f'--max-images={args.max_images} must be at least 1')
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder '{args.out.absolute().parent}'")
    if args.out.exists() and args.out.samefile(args.checkpoint):
        raise ConfigError(f"--out: '{args.out}' is the checkpoint itself; choose another name")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise ConfigError(f"--out: '{args.out}' exists; choose another name, or use --overwrite")


@torch.no_grad()
def measure(model: nn.Module, data: AnalysisData, name: str = 'images') -> dict:
    """The metrics of a model, predicting the images of a data set.

    Args:
        model: A classifier or a detector, in evaluation mode.
        data: The data set.
        name: What the progress bar is called.

    Returns:
        As :class:`ClassificationMetrics` and :class:`DetectionMetrics` do; and, of data sets that
        have them, ``per_group``: accuracy or AP on the images of each group, see
        :attr:`AnalysisData.groups`, and ``per_superclass``: its mean over the classes of each.
    """
    parts: list[BoxRecords | np.ndarray] = []
    with tqdm(total=len(data), desc=name, unit=' images', mininterval=0.5) as bar:
        for batch in data.batches():
            results = model.test_step(batch)
            parts.append(predictions_of(range(bar.n, bar.n + len(results)), results))
            bar.update(len(results))
            if bar.n == len(data):
                break
    found = concatenated(parts)
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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _table(before: dict, after: dict) -> str:
    lines = [('', 'before', 'after', 'change')]
    for name, value in before.items():
        if name not in _PARTS:
            lines.append(_line(name, value, after[name]))
    for part, title in _PARTS.items():
        for name, value in before.get(part, {}).items():
            lines.append(_line(f'{title} {name}', value, after[part][name]))
    return in_columns(lines)


def _line(name: str, before: float | None, after: float | None) -> tuple[str, ...]:
    if before is None or after is None:
        return (name, '-', '-', '-')
    return (name, f'{before:.4f}', f'{after:.4f}', f'{after - before:+.4f}')
