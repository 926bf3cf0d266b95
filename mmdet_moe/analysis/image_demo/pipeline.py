"""The test pipeline of a config for single image files, and where its output lies on the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from mmdet_moe.errors import ConfigError

# Transforms whose geometry is known, by the names of their classes or base classes.
_RESIZES, _CROPS, _PADS = {'Resize', 'ResizeEdge'}, {'CenterCrop'}, {'Pad'}


@dataclass(frozen=True)
class Placement:
    """Where the network's input lies on the original image: ``network = scale · image + shift``.

    Attributes:
        scale: Along x and y, network px per image px.
        shift: Along x and y, network px.
        size: Width and height of the network's input without padding, px.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]
    size: tuple[int, int]

    def on_image(self, position: np.ndarray, axis: int) -> np.ndarray:
        """Network px to px of the original image, along x (axis 0) or y (1)."""
        return (np.asarray(position, dtype=float) - self.shift[axis]) / self.scale[axis]

    def seen(self, axis: int) -> tuple[float, float]:
        """The part of the original image that the network sees, from and to, px."""
        first, last = self.on_image(np.array([0, self.size[axis]]), axis)
        return float(first), float(last)

    def after(self, name: str, before: tuple[int, int], size: tuple[int, int]) -> 'Placement':
        """The placement after one more transform.

        Args:
            name: ``'resize'``, ``'crop'`` (about the middle) or ``'pad'`` (right and bottom).
            before: Width and height before it, padding included, px.
            size: The same after it.
        """
        if name == 'pad':
            return self
        if name == 'crop':
            # As both toolboxes round; an axis that was too short has been padded.
            starts = [max(0, round((b - a) / 2)) for b, a in zip(before, size, strict=True)]
            shift = tuple(t - start for t, start in zip(self.shift, starts, strict=True))
            inner = tuple(min(i - s, a) for i, s, a in zip(self.size, starts, size, strict=True))
            return Placement(self.scale, shift, inner)
        ratios = [a / b for b, a in zip(before, size, strict=True)]
        return Placement(
            tuple(s * r for s, r in zip(self.scale, ratios, strict=True)),
            tuple(t * r for t, r in zip(self.shift, ratios, strict=True)),
            tuple(round(i * r) for i, r in zip(self.size, ratios, strict=True)),
        )


@dataclass(frozen=True)
class LoadedImage:
    """One image, ready for the model.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, the original image.
        data: What the pipeline made of it: ``inputs`` and ``data_samples``.
        placement: Where ``inputs`` lie on it; None if that is unknown.
        obstacle: The type of the transform after which it is unknown.
    """

    pixels: np.ndarray
    data: dict[str, Any]
    placement: Placement | None
    obstacle: str | None


class ImagePipeline:
    """The pipeline of ``test_dataloader``, without annotations.

    Args:
        cfg: The config, in its default scope.
        channels: Of the network's input. Only data sets without image files need it.

    Raises:
        ConfigError: If the config has no such pipeline.
    """

    def __init__(self, cfg: Config, channels: int = 3) -> None:
        steps = [
            TRANSFORMS.build(step) if isinstance(step, Mapping) else step
            for step in dataset_of_tests(cfg)['pipeline']
            if not (isinstance(step, Mapping) and 'LoadAnnotations' in str(step.get('type')))
        ]
        self._channels = channels
        self._reader = next((s for s in steps if isinstance(s, LoadImageFromFile)), None)
        self._steps = [step for step in steps if step is not self._reader]

    def __call__(self, path: Path) -> LoadedImage:
        """Run the pipeline.

        Args:
            path: The image file.

        Raises:
            ConfigError: If the image cannot be read.
        """
        results = self._read(path)
        image = results['img']
        size = _size(image)
        placement, obstacle = Placement((1.0, 1.0), (0.0, 0.0), size), None
        for step in self._steps:
            results = step(results)
            if 'img' not in results:  # packed
                continue
            before, size = size, _size(results['img'])
            kind = _kind(step)
            if (size != before and kind is None) or results.get('flip'):
                placement, obstacle = None, obstacle or type(step).__name__
            elif size != before and placement is not None:
                placement = placement.after(kind, before, size)
        return LoadedImage(_rgb(image, self._reader is None), results, placement, obstacle)

    def _read(self, path: Path) -> dict:
        try:
            if self._reader is not None:
                # MMDetection's packing asks for the id that its data sets give.
                return self._reader({'img_path': str(path), 'img_id': 0, 'sample_idx': 0})
            # The data set holds arrays (CIFAR, MNIST), in RGB or grey.
            colour = self._channels == 3
            image = mmcv.imread(str(path), 'color' if colour else 'grayscale', 'rgb')
            shape = image.shape[:2]
        except MemoryError:
            raise
        except Exception as error:
            reason = 'the file is damaged or no image'
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise ConfigError(f"cannot read the image '{path}': {reason}") from error
        return {'img': image, 'img_path': str(path), 'ori_shape': shape, 'img_shape': shape}


def dataset_of_tests(cfg: Config) -> Mapping[str, Any]:
    """The (first) data set of ``test_dataloader``, wrappers taken off.

    Raises:
        ConfigError: If there is none with a pipeline.
    """
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = loader.get('dataset') or {}
    while 'pipeline' not in dataset:
        inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
        if inner is None:
            raise ConfigError(
                'test_dataloader: the config has no data set with a pipeline, which says how an '
                'image is loaded and resized for the model'
            )
        dataset = inner
    return dataset


def _kind(step: Any) -> str | None:
    names = {cls.__name__ for cls in type(step).__mro__}
    for kind, known in (('resize', _RESIZES), ('crop', _CROPS), ('pad', _PADS)):
        if names & known:
            return kind
    return None


def _size(image: Any) -> tuple[int, int]:
    """Width and height of an array, or of an image of Pillow; both are around in pipelines."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    return tuple(image.size) if isinstance(getattr(image, 'size', None), tuple) else (-1, -1)


def _rgb(image: np.ndarray, is_rgb: bool) -> np.ndarray:
    """What a pipeline loaded, as uint8 RGB for the eye."""
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype == np.uint16:
        image = image // 257
    image = np.clip(image, 0, 255).astype(np.uint8)
    if image.shape[2] < 3:
        return np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(image[..., :3] if is_rgb else image[..., 2::-1])
