"""The model of a config, and one forward pass of it without any data."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdet_moe.engine.explain import explain, in_one_line
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model, and on what images."""
    parser.add_argument('config', help='config file of a detector or a classifier')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="of the images (default: as in the classifier's training; 320 320 for a detector)",
    )
    add_cfg_options(parser)


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, with random weights: nothing is downloaded.

    Raises:
        ConfigError: If it cannot be built.
    """
    init_default_scope(cfg.default_scope)
    try:
        return MODELS.build(cfg.model)
    except ConfigError:
        raise
    except Exception as error:  # whatever the constructors raise is a mistake in the config
        why = explain(error) or in_one_line(error)
        raise ConfigError(f'the model cannot be built: {why}') from error


def image_size(cfg: Config, shape: Sequence[int] | None = None) -> tuple[int, int]:
    """(H, W) for a dry run: ``--shape``, or what the images of a classifier are cropped to; 320
    for a detector, which takes any.

    Raises:
        ConfigError: If ``shape`` is none of an image.
    """
    if shape is not None:
        height, width = shape
        if min(shape) < 1:
            raise ConfigError(f'--shape {height} {width}: height and width must be at least 1')
        return height, width
    size: Any = 320
    if cfg.default_scope == 'mmpretrain':
        dataset = cfg.get('train_dataloader', {}).get('dataset', {})
        pipeline = dataset.get('pipeline') or cfg.get('train_pipeline', [])
        sizes = [t.get('crop_size', t.get('scale')) for t in pipeline]
        size = next((s for s in reversed(sizes) if s), 224)
    return (size, size) if isinstance(size, int) else tuple(size)[:2]


def dry_run(
    model: nn.Module, scope: str, size: tuple[int, int], num_images: int = 2
) -> Callable[[], Any]:
    """A function that sends blank images through a detector or a classifier.

    Args:
        model: Its data preprocessor is passed by.
        scope: ``'mmdet'`` or ``'mmpretrain'``.
        size: (H, W).
        num_images: N.

    Returns:
        It raises a ConfigError if the model does not run.
    """
    widths = (getattr(part, 'in_channels', None) for part in model.modules())
    is_grey = next((width for width in widths if isinstance(width, int)), None) == 1
    images = torch.zeros(num_images, 1 if is_grey else 3, *size)
    if (parameter := next(model.parameters(), None)) is not None:
        images = images.to(parameter)
    samples = None
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
        samples = [DetDataSample(metainfo={**shapes, 'scale_factor': (1.0, 1.0)}) for _ in images]

    def run() -> Any:
        try:
            return model(images, samples, mode='tensor')
        except Exception as error:  # of any kind, out of the model's own code
            raise ConfigError(
                f'the model does not run on images of {size[0]}×{size[1]} pixels '
                f'({in_one_line(error)})'
            ) from error

    return run
