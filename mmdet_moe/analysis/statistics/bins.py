"""What decisions are compared with, sorted into bins: size, position, and anything with names.

A bin of -1 means that a thing belongs to none (an unknown size); associations leave it out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: COCO's borders between small, medium and large, in px of the square root of the area.
COCO_LIMITS = (32.0, 96.0)


@dataclass(frozen=True)
class Bins:
    """Bins with names, in order.

    Attributes:
        names: One for each of the B bins, all different.
        edges: B + 1 increasing numbers, for bins along an axis. Where the first and the last bin
            are open-ended, the outermost edges are only where a figure may end.
        unit: Of the edges.
    """

    names: list[str]
    edges: list[float] | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f'two bins have the same name: {self.names}')
        if self.edges is not None and len(self.edges) != len(self.names) + 1:
            raise ValueError(f'{len(self.names)} bins cannot have {len(self.edges)} edges')

    def __len__(self) -> int:
        return len(self.names)

    def find(self, values: np.ndarray) -> np.ndarray:
        """The bin of each value, for bins with edges; the first and the last are open-ended.

        Args:
            values: (n,). A value on an edge belongs to the bin above.

        Returns:
            int64 (n,); -1 for NaN.

        Raises:
            ValueError: If the bins have no edges.
        """
        if self.edges is None:
            raise ValueError('bins without edges cannot be searched')
        return _find(values, self.edges[1:-1])


def level_bins(count: int) -> Bins:
    """The bins of the attribute ``level``, from level 0 on."""
    return Bins([str(level) for level in range(count)])


def size_bins(low: float = 8, high: float = 512) -> Bins:
    """Logarithmic bins of half an octave for ``sqrt(box area)`` in px.

    The default range holds what detectors are asked to find: below 8 px an object is smaller than
    a stride of the finest usual level, above 512 px it fills the usual input. Half octaves resolve
    pyramid levels, which are a whole octave each, and have COCO's 32 px among their edges.

    Args:
        low: Smaller objects share the first bin.
        high: The last edge is the first one that is not below it; larger objects share the last
            bin.

    Returns:
        Bins such as ``<8``, ``8-11``, ``11-16``, …, ``362-512``, ``>=512`` with edges in px; the
        outermost edges lie half an octave further out.
    """
    if not 0 < low < high:
        raise ValueError(f'0 < low < high is needed, not low={low}, high={high}')
    steps = math.ceil(2 * math.log2(high / low) - 1e-9)
    edges = [float(low) * 2 ** (i / 2) for i in range(-1, steps + 2)]
    inner = [f'{edge:.0f}' for edge in edges[1:-1]]
    between = [f'{a}-{b}' for a, b in pairwise(inner)]
    return Bins([f'<{inner[0]}', *between, f'>={inner[-1]}'], edges, 'px')


#: The 14 bins of the attribute ``size``.
SIZES = size_bins()
#: The bins of the attribute ``size_coco``: small < 32 px <= medium < 96 px <= large.
COCO_SIZES = Bins(['small', 'medium', 'large'])
#: The 3 x 3 cells of an image, row by row.
POSITIONS = Bins(
    [f'{y} {x}' for y in ('top', 'middle', 'bottom') for x in ('left', 'centre', 'right')]
)


def box_sizes(boxes: np.ndarray) -> np.ndarray:
    """``sqrt(area)`` in px of boxes (n, 4), xyxy: (n,) of their dtype."""
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def size_bin(size_px: np.ndarray) -> np.ndarray:
    """The bin in :data:`SIZES` of ``sqrt(area)`` in px, int64 (n,); -1 for NaN."""
    return SIZES.find(size_px)


def coco_size_bin(size_px: np.ndarray) -> np.ndarray:
    """The bin in :data:`COCO_SIZES` of ``sqrt(area)`` in px, int64 (n,); -1 for NaN."""
    return _find(size_px, COCO_LIMITS)


def position_bin(x_rel: np.ndarray, y_rel: np.ndarray) -> np.ndarray:
    """The cell in :data:`POSITIONS`.

    Args:
        x_rel: (n,), 0 at the left edge of the image and 1 at the right; values beyond belong to
            the outer cells.
        y_rel: (n,), 0 at the top and 1 at the bottom.

    Returns:
        int64 (n,); -1 where x or y is NaN.
    """
    thirds = (1 / 3, 2 / 3)
    x, y = _find(x_rel, thirds), _find(y_rel, thirds)
    return np.where((x < 0) | (y < 0), -1, 3 * y + x)


def _find(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isnan(values), -1, np.searchsorted(limits, values, side='right'))
