"""Is this image rotated? A binary task with hidden clusters, made of any classification data."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import DATASETS as ANY_DATASETS
from mmengine.registry import TRANSFORMS
from scipy import ndimage

from mmdet_moe.checks import check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import DATASETS

#: How far the square stays off the border, where the image has to be made up for the filters, in
#: standard deviations of the blur.
_MARGIN = 2


@DATASETS.register_module()
class RotatedPairs:
    """Every image of a data set twice: upright (label 0) and rotated (label 1).

    The class of the image stays with it as ``cluster``, the hidden cluster of the sample
    (CIFAR-10-Rotate, arXiv 2208.02813). Sample 2i is the upright version of image i, sample 2i + 1
    the rotated one.

    Nothing but the content may tell the two versions apart, but a rotated image lacks its corners,
    and interpolation leaves traces. So of both versions only the centred square is shown that lies
    inside of the image either way, enlarged to the size of the image. The authors crop 32×32 pixels
    to 24×24, of which the corners are still outside; a square ``m`` pixels inside of the border has
    a side of ``(S − 1 − 2 m) / (|cos| + |sin|)`` pixel distances, S the image's shorter side, and
    ``m`` is twice the standard deviation of the blur.

    The traces are in details of the size of a pixel: on noise without any direction, a network of
    three convolutions tells versions apart that were only interpolated by the same rule. So both
    are blurred before, from what lies beyond the square too, and interpolated by splines of the
    fifth order: then it can but guess (``python -m research.checks.rotation_traces``).

    The order of events is: the pipeline of ``dataset`` (loading and augmentation), the rotation,
    ``pipeline``. An augmentation that changes directions, as a flip does, belongs into the former,
    so that all rotated images are rotated the same way.

    Args:
        dataset: Config of a data set whose samples have ``img``, an array (H, W) or (H, W, C), and
            a single ``gt_label``; its pipeline does not pack them.
        pipeline: What is done with the samples after the rotation, packing included.
        angle: In degrees, counter-clockwise.
        blur: Standard deviation of the Gaussian that both versions are blurred with before, in
            pixels; 0 for none.

    Raises:
        ConfigError: For an angle that is not a number or leaves the image as it is, a ``blur`` that
            is no number of at least 0, and for samples
            with several labels, without an image, or with one that cannot be rotated.
    """

    METAINFO = {'classes': ('upright', 'rotated')}

    def __init__(
        self,
        dataset: dict,
        pipeline: Sequence[dict] = (),
        angle: float = 30.0,
        blur: float = 1.0,
    ) -> None:
        if isinstance(angle, bool) or not isinstance(angle, (int, float)):
            raise ConfigError(f'angle={angle!r} must be a number of degrees, such as 30')
        if not math.isfinite(angle) or angle % 360 == 0:
            raise ConfigError(
                f'angle={angle} leaves upright and rotated images alike; use another one, such as '
                '30'
            )
        check_number(type(self).__name__, 'blur', blur, least=0)
        self.angle, self.blur = angle, blur
        self.dataset = ANY_DATASETS.build(dataset)
        self.pipeline = Compose([TRANSFORMS.build(step) for step in pipeline])

    def full_init(self) -> None:
        """Load what is still to be loaded, as the data sets of MMEngine do."""
        self.dataset.full_init()

    @property
    def metainfo(self) -> dict[str, Any]:
        """``classes``, and ``clusters``: what the wrapped data set calls its classes."""
        return {**self.METAINFO, 'clusters': self.dataset.metainfo.get('classes')}

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What is known of a sample before any augmentation.

        Images in memory are as the version shows them; of others only ``img_path`` is known, which
        is that of the whole upright image.
        """
        info = self._with_task(self.dataset.get_data_info(index // 2), index)
        return self._shown(info) if 'img' in info else info

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} samples')
        index %= len(self)
        results = self.dataset[index // 2]
        if not isinstance(results, dict) or 'img' not in results:
            raise ConfigError(
                'RotatedPairs rotates the `img` of a sample, which those of dataset.type='
                f'{type(self.dataset).__name__} lack after its pipeline; load it there, and move '
                'PackInputs to the pipeline of RotatedPairs'
            )
        return self.pipeline(self._shown(self._with_task(results, index)))

    def _with_task(self, results: dict[str, Any], index: int) -> dict[str, Any]:
        label = np.asarray(results.get('gt_label', ()))
        if label.size != 1:
            raise ConfigError(
                'RotatedPairs needs one gt_label for every image, the hidden cluster, but '
                f'dataset.type={type(self.dataset).__name__} has {label.size}; use single-label '
                'data'
            )
        return {
            **results,
            'gt_label': index % 2,
            'cluster': int(label.item()),
            'sample_idx': index,
        }

    def _shown(self, results: dict[str, Any]) -> dict[str, Any]:
        """The version of the sample's image."""
        rotated = bool(results['gt_label'])
        shown = rotated_square(results['img'], self.angle, rotated, self.blur)
        return {**results, 'img': shown}


def rotated_square(image: np.ndarray, angle: float, rotate: bool, blur: float = 1.0) -> np.ndarray:
    """The square of an image that stays inside of it under a rotation, rotated or not.

    Args:
        image: (H, W) or (H, W, C), of numbers.
        angle: In degrees, counter-clockwise.
        rotate: Whether to turn the image.
        blur: Standard deviation of a Gaussian that it is blurred with before, in pixels.

    Returns:
        The same shape and type: the square, enlarged to S×S and, for images that are not square,
        stretched to H×W.

    Raises:
        ConfigError: For images of another kind, or without such a square.
    """
    is_image = isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.size > 0
    if not is_image or image.dtype.kind not in 'uif':
        found = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image)
        raise ConfigError(
            f'RotatedPairs rotates arrays (H, W) or (H, W, C) of numbers, got {found}; convert '
            'them in dataset.pipeline'
        )
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    side = (min(height, width) - 1 - 2 * _MARGIN * blur) / (abs(cos) + abs(sin))
    if side <= 0:
        raise ConfigError(
            f'RotatedPairs: of an image of {height}×{width} pixels nothing is left with '
            f'blur={blur}; take a smaller one'
        )
    if not rotate:
        cos, sin = 1.0, 0.0
    # From a row (down) and column (to the right) of the result to its place in the image.
    turn = np.array([[cos, sin], [-sin, cos]])
    matrix = turn @ np.diag([side / max(height - 1, 1), side / max(width - 1, 1)])
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    channels = image.reshape(height, width, -1).astype(float)
    if blur:
        channels = ndimage.gaussian_filter(channels, (blur, blur, 0), mode='mirror')
    shown = np.stack(
        [
            ndimage.affine_transform(c, matrix, middle - matrix @ middle, order=5, mode='mirror')
            for c in np.moveaxis(channels, -1, 0)
        ],
        axis=-1,
    )
    if image.dtype.kind != 'f':
        limits = np.iinfo(image.dtype)
        shown = np.rint(shown).clip(limits.min, limits.max)
    return shown.reshape(image.shape).astype(image.dtype)
