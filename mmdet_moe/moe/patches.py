"""Patch granularity: one feature map as a g×g grid of patches, each an item of its own.

An expert gives a patch what it would give that place of the whole feature map, so 3×3 convolutions
see the true neighbours. To get there without running the expert on the whole map, a patch is cut
out together with a halo as wide as the expert's receptive field. A patch at the border of the image
is cut flush with the border, where the expert's own zero padding is the true one, and reaches as
much further into the image instead: all crops have one size, and the margin that fake padding
spoils is cut off afterwards. With g = 1 the crop is the feature map itself.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.items import Items, check_map, grid_centres
from mmdet_moe.moe.layout import memory_format_of
from mmdet_moe.moe.precision import no_autocast

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer


@dataclass(frozen=True)
class _Axis:
    """The cuts along one axis, in pixels of the expert's input unless said otherwise."""

    bounds: tuple[int, ...]  # of the patches in the output, g + 1 values
    starts: tuple[int, ...]  # of the crops, g values, multiples of the stride
    crop: int
    length: int
    stride: int

    @classmethod
    def cut(cls, length: int, grid: int, stride: int, halo: int) -> '_Axis':
        out_length = -(-length // stride)
        grid = min(grid, out_length)
        bounds = tuple(i * out_length // grid for i in range(grid + 1))
        if grid == 1:
            return cls(bounds, (0,), length, length, stride)
        halo = -(-halo // stride) * stride
        patch = max(b - a for a, b in pairwise(bounds)) * stride
        crop = min(length, patch + 2 * halo)
        # The last crop ends at the border and has to start on the stride, too.
        crop += (length - crop) % stride
        starts = tuple(max(0, min(b * stride - halo, length - crop)) for b in bounds[:-1])
        return cls(bounds, starts, crop, length, stride)

    def __len__(self) -> int:
        return len(self.starts)

    def pooling_matrix(self, like: Tensor) -> Tensor:
        """(g, length): row i averages over the input pixels of patch i."""
        matrix = like.new_zeros(len(self), self.length)
        for i in range(len(self)):
            start, stop = self.bounds[i] * self.stride, self.bounds[i + 1] * self.stride
            stop = min(stop, self.length)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    def locate(self, position: Tensor) -> Tensor:
        """int64 (n,): the patch that holds a relative position in 0..1."""
        inner = torch.tensor(self.bounds[1:-1], device=position.device, dtype=position.dtype)
        return torch.bucketize(position * self.bounds[-1], inner, right=True)

    def centres(self) -> Tensor:
        """(g,): the relative position of the middle of every patch."""
        borders = self.borders()
        return (borders[1:] + borders[:-1]) / 2

    def borders(self) -> Tensor:
        """(g + 1,): the relative positions between which the patches lie."""
        return torch.tensor(self.bounds, dtype=torch.float32) / self.bounds[-1]

    def inside(self, i: int) -> slice:
        """Where patch i lies in the output of its crop."""
        offset = self.starts[i] // self.stride
        return slice(self.bounds[i] - offset, self.bounds[i + 1] - offset)


@dataclass(frozen=True)
class PatchGrid(Items):
    """The patches of one feature map.

    Args:
        size: (H, W) of the expert's input.
        grid: Patches per axis, g; fewer where the map has fewer output pixels.
        stride: Total stride of the expert.
        halo: Radius of the expert's receptive field in input pixels.
    """

    size: tuple[int, ...]
    grid: int = 1
    stride: int = 1
    halo: int = 0

    @classmethod
    def check(cls, layer: 'MoELayer') -> None:
        if layer.grid_size < 2:
            raise ConfigError(
                f"granularity='patch' needs grid_size of at least 2, got {layer.grid_size}"
            )

    @classmethod
    def divide(cls, layer: 'MoELayer', x: Tensor) -> 'PatchGrid':
        check_map(layer, x)
        return cls(tuple(x.shape[-2:]), layer.grid_size, layer.stride, layer.halo)

    @property
    def _axes(self) -> tuple[_Axis, _Axis]:
        rows = _Axis.cut(self.size[0], self.grid, self.stride, self.halo)
        return rows, _Axis.cut(self.size[1], self.grid, self.stride, self.halo)

    def __len__(self) -> int:
        """Patches per image."""
        if self.grid == 1:
            return 1
        rows, cols = self._axes
        return len(rows) * len(cols)

    def pool(self, x: Tensor) -> Tensor:
        """Mean of every patch (no halo): (N, C, H, W) to (N · patches, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if len(self) == 1:
            return x.mean(dim=(2, 3), dtype=dtype)
        rows, cols = (axis.pooling_matrix(x.to(dtype)) for axis in self._axes)
        return torch.einsum('gh,nchw,kw->ngkc', rows, x.to(dtype), cols).flatten(0, 2)

    def crop(self, x: Tensor) -> Tensor:
        """Cut out every patch with its halo: (N, C, H, W) to (N · patches, C, h, w)."""
        if len(self) == 1:
            return x
        rows, cols = self._axes
        keeps = memory_format_of(x) == torch.channels_last
        x, height = (x.permute(0, 2, 3, 1), 1) if keeps else (x, 2)  # as it lies in memory
        crops = [
            x.narrow(height, r, rows.crop).narrow(height + 1, c, cols.crop)
            for r in rows.starts
            for c in cols.starts
        ]
        x = torch.stack(crops, dim=1).flatten(0, 1)
        return x.permute(0, 3, 1, 2) if keeps else x

    def locate(self, x: Tensor, y: Tensor) -> Tensor:
        """The patch that holds a place, row by row."""
        rows, cols = self._axes
        return rows.locate(y) * len(cols) + cols.locate(x)

    def centres(self) -> Tensor:
        """The middle of every patch."""
        rows, cols = self._axes
        return grid_centres(rows.centres(), cols.centres())

    def borders(self) -> tuple[Tensor, Tensor]:
        """The edges of the patches."""
        rows, cols = self._axes
        return cols.borders(), rows.borders()

    def place(self, y: Tensor) -> Tensor:
        """Put the experts' outputs for the crops together to one map (N, C, H', W').

        Raises:
            ConfigError: If an expert's output is not its input's size divided by the stride.
        """
        if len(self) == 1:
            return y
        rows, cols = self._axes
        expected = (-(-rows.crop // self.stride), -(-cols.crop // self.stride))
        if tuple(y.shape[2:]) != expected:
            raise ConfigError(
                f'granularity="patch" needs experts that keep the size (up to their stride '
                f'{self.stride}), but an expert made {tuple(y.shape[2:])} of a '
                f'{(rows.crop, cols.crop)} crop; pad it by (kernel_size - 1) // 2 · dilation'
            )
        patches = y.unflatten(0, (-1, len(rows), len(cols)))
        lines = [
            torch.cat(
                [patches[:, i, j, :, rows.inside(i), cols.inside(j)] for j in range(len(cols))],
                dim=-1,
            )
            for i in range(len(rows))
        ]
        return torch.cat(lines, dim=-2)

    def total(self, values: Tensor) -> Tensor:
        """(N, n · H · W) to (N · patches,)."""
        if len(self) == 1:
            return values.sum(1)
        pixels = values.unflatten(1, (*self.size, -1)).sum(3).float()
        rows, cols = (axis.pooling_matrix(pixels).sign() for axis in self._axes)
        with no_autocast(values.device.type):
            return torch.einsum('gh,nhw,kw->ngk', rows, pixels, cols).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """(N · patches, E) to (N, E, H, W)."""
        rows, cols = (axis.pooling_matrix(values).sign() for axis in self._axes)
        grid = values.unflatten(0, (-1, len(rows), len(cols)))
        with no_autocast(values.device.type):
            return torch.einsum('gh,ngke,kw->nehw', rows, grid, cols)
