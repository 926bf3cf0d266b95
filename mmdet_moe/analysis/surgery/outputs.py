"""The folder with a new checkpoint and its config."""

import argparse
from pathlib import Path

import numpy as np
from mmengine.config import Config
from torch import nn

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.measuring import add_options, comparison, metrics_of, write_checkpoint
from mmdet_moe.analysis.records.contents import BoxRecords
from mmdet_moe.cli import check_folder
from mmdet_moe.errors import ConfigError

CONFIG_FILE = 'config.py'
CHECKPOINT_FILE = 'checkpoint.pth'


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--out``, and the options of every tool that changes a model and measures it."""
    parser.add_argument(
        '--out',
        type=Path,
        required=True,
        metavar='DIR',
        help=f'folder for {CHECKPOINT_FILE} and {CONFIG_FILE}, which tools/test.py and '
        'tools/train.py take as they are',
    )
    add_options(parser)


def check_output(args: argparse.Namespace, *inputs: str) -> None:
    """Refuse a folder that cannot be written to, or that holds such files already.

    Args:
        args: With ``out`` and ``overwrite``.
        inputs: Configs and checkpoints that are read.

    Raises:
        ConfigError: It does, or one of the inputs would be replaced.
    """
    check_folder(args.out, '--out')
    for path in (args.out / CONFIG_FILE, args.out / CHECKPOINT_FILE):
        # An input may be an address, and whether it is there is told later.
        if path.exists() and any(Path(i).exists() and path.samefile(i) for i in inputs):
            raise ConfigError(f"--out: '{path}' is what is read; choose another folder")
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise ConfigError(f"--out: '{path}' exists; choose another folder, or use --overwrite")


def write_model(out: Path, cfg: Config, model: nn.Module, meta: dict, notes: list[str]) -> None:
    """Write a model and its config. Trained with it, the model goes on from the checkpoint.

    Args:
        out: The folder, which is made.
        cfg: The config; changed so that its logs and checkpoints have a place of their own.
        model: The model.
        meta: What the checkpoint that it comes from says of itself.
        notes: What was done, one sentence each; they are added to ``meta['surgery']``.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: '{out}' cannot be made: {error.strerror}") from error
    checkpoint = out.absolute() / CHECKPOINT_FILE
    cfg.work_dir = f'work_dirs/{out.absolute().name}'
    cfg.load_from, cfg.resume = str(checkpoint), False
    text = cfg.pretty_text
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    notes = [*meta.get('surgery', ()), *notes]
    write_checkpoint(checkpoint, state, {**meta, 'surgery': notes, 'cfg': text})
    write_file(out / CONFIG_FILE, text.encode())


def compare(
    data: AnalysisData, before: BoxRecords | np.ndarray, after: BoxRecords | np.ndarray
) -> tuple[dict, dict, str]:
    """The metrics of predictions before and after, and what is to be said of them.

    Args:
        data: The images.
        before, after: As of :func:`~mmdet_moe.analysis.measuring.predict`.
    """
    metrics = metrics_of(before, data), metrics_of(after, data)
    are = _likeness(before, after)
    # Those of a classifier are known without their scores.
    what = 'predicted classes' if isinstance(before, np.ndarray) else 'predictions'
    text = f'{comparison(*metrics)}\n\nThe {what} for the {len(data)} images {are}.'
    return *metrics, text


def _likeness(before: BoxRecords | np.ndarray, after: BoxRecords | np.ndarray) -> str:
    if isinstance(before, np.ndarray):
        return 'are the same' if np.array_equal(before, after) else 'differ'
    pairs = [(value, getattr(after, name)) for name, value in vars(before).items()]
    if all(np.array_equal(*pair) for pair in pairs):
        return 'are the same'
    # Of px and scores; a detection that comes in or goes out at a threshold is a difference.
    is_close = all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-3) for a, b in pairs)
    return 'are the same up to rounding' if is_close else 'differ'
