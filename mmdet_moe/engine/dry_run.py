"""The model of a config, and one forward pass of it without any data."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmdet_moe.engine.explain import explain, in_one_line
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.engine.preflight import datasets_of
from mmdet_moe.engine.preflight.arrays import side_of
from mmdet_moe.errors import ConfigError

#: Of images that classifiers and detectors are made for.
_SIDES = (224, 256, 320, 336, 384, 448, 512, 32, 28)


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
    """(H, W) for a dry run: ``--shape``, or what the images of a classifier are cropped to, or what
    those of CIFAR and MNIST have; 320 for a detector, which takes any.

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
        inside = next(datasets_of(cfg, dataset, 'train_dataloader.dataset'), None)
        # What a wrapper does comes later.
        steps = [
            *((inside and inside.cfg.get('pipeline')) or ()),
            *(dataset.get('pipeline') or cfg.get('train_pipeline', ())),
        ]
        sizes = [t.get('crop_size', t.get('scale')) for t in steps]
        usual = (inside and side_of(inside.cls)) or 224
        size = next((s for s in reversed(sizes) if s), usual)
    return (size, size) if isinstance(size, int) else tuple(size)[:2]


def dry_run(
    model: nn.Module,
    scope: str,
    size: tuple[int, int],
    num_images: int = 2,
    mode: str = 'tensor',
    suggest: bool = False,
) -> Callable[[], Any]:
    """A function that sends blank images through a detector or a classifier.

    Each image of a detector has one object, as some run their mask heads on matched objects alone.

    Args:
        model: Its data preprocessor is passed by.
        scope: ``'mmdet'`` or ``'mmpretrain'``.
        size: (H, W).
        num_images: N.
        mode: Of MMEngine's models: ``'tensor'``, ``'predict'`` or ``'loss'``.
        suggest: Try other sizes if the model does not run, to say whether ``--shape`` helps.

    Returns:
        It raises a ConfigError if the model does not run.
    """

    def send(size: tuple[int, int]) -> Any:
        return model(*_blank(model, scope, size, num_images), mode=mode)

    def run() -> Any:
        try:
            return send(size)
        except Exception as error:  # of any kind, out of the model's own code
            why = f'the model does not run on images of {size[0]}×{size[1]} pixels'
            side = next((s for s in _SIDES if suggest and _runs(send, s)), None)
            advice = f'; on others it does: give --shape {side} {side}' if side else ''
            if suggest and not side:
                why += ', nor of any other size that was tried'
            what = f'{type(error).__name__}: {in_one_line(error)}'
            raise ConfigError(f'{why} ({what}){advice}') from error

    return run


def _runs(send: Callable[[tuple[int, int]], Any], side: int) -> bool:
    try:
        send((side, side))
    except Exception:  # as above
        return False
    return True


def _blank(
    model: nn.Module, scope: str, size: tuple[int, int], num_images: int
) -> tuple[torch.Tensor, list | None]:
    """The images (N, C, H, W), and what is known of them."""
    widths = (getattr(part, 'in_channels', None) for part in model.modules())
    is_grey = next((width for width in widths if isinstance(width, int)), None) == 1
    images = torch.zeros(num_images, 1 if is_grey else 3, *size)
    if (parameter := next(model.parameters(), None)) is not None:
        images = images.to(parameter)
    if scope != 'mmdet':
        return images, None
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
    samples = [DetDataSample(metainfo={**shapes, 'scale_factor': (1.0, 1.0)}) for _ in images]
    height, width = size
    masks = np.ones((1, height, width), np.uint8)
    for sample in samples:
        sample.gt_instances = InstanceData(
            bboxes=images.new_tensor([[0, 0, width, height]]),
            labels=images.new_zeros(1, dtype=torch.long),
            masks=BitmapMasks(masks, height, width),
        )
    return images, samples
