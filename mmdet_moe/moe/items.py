"""Items: what an input is divided into, and what one decision of the router covers.

Images and patches of images are in :mod:`mmdet_moe.moe.patches`.
"""

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.layout import memory_format_of
from mmdet_moe.moe.receptive_field import check_tokenwise

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer


class Items(ABC):
    """The items of one input, which holds N images (its first dimension) with equally many each.

    A kind of items says which layers it suits (:meth:`check`) and divides their inputs
    (:meth:`divide`).
    """

    @classmethod
    def check(cls, layer: 'MoELayer') -> None:
        """Refuse a layer that cannot work on such items.

        Raises:
            ConfigError: Naming the option that does not fit.
        """
        if layer.grid_size != 1:
            raise ConfigError(
                f'grid_size={layer.grid_size} has no effect with granularity='
                f"{layer.granularity!r}; set granularity='patch'"
            )

    @classmethod
    @abstractmethod
    def divide(cls, layer: 'MoELayer', x: Tensor) -> 'Items':
        """The items of one input of a layer.

        Raises:
            ValueError: If the input has another shape than such items need.
        """

    @classmethod
    def prepare(cls, x: Tensor) -> Tensor:
        """The input in the memory format in which its items are cheapest to take out."""
        return x

    @abstractmethod
    def __len__(self) -> int:
        """Items per image."""

    @property
    def per_image(self) -> int:
        """``len(self)``, which Python keeps as a number where an export leaves the size free."""
        return len(self)

    @abstractmethod
    def pool(self, x: Tensor) -> Tensor:
        """The mean of each item of an input, for the router: (N · items, C), at least float32."""

    def pooled(self, x: Tensor) -> Tensor:
        """:meth:`pool` of an input, computed once: the logits and their noise both ask for it."""
        of, values = self.__dict__.get('_pooled', (None, None))
        if of is None or of() is not x:
            values = self.pool(x)
            self.__dict__['_pooled'] = (weakref.ref(x), values)
        return values

    def forget_pooled(self) -> None:
        """Nobody asks for it any more: it may hold as much memory as the input."""
        self.__dict__['_pooled'] = (None, None)

    @abstractmethod
    def crop(self, x: Tensor) -> Tensor:
        """The items themselves, for the experts: (N · items, ...)."""

    @abstractmethod
    def locate(self, x: Tensor, y: Tensor) -> Tensor:
        """Which item of its image holds a place.

        Args:
            x: (n,), from 0 (left) to 1 (right), relative to the width of the map.
            y: (n,), from 0 (top) to 1 (bottom).

        Returns:
            int64 (n,), in 0 … ``len(self) - 1``; -1 where items have no place.
        """

    @abstractmethod
    def centres(self) -> Tensor:
        """(len(self), 2) float32: the relative x and y of the middle of each item; NaN without."""

    def borders(self) -> tuple[Tensor, Tensor] | None:
        """Where the items of an image end and the next ones begin, if they form a grid.

        Returns:
            Relative x, (columns + 1,), and relative y, (rows + 1,), float32, from 0 to 1; None
            where items have no place.
        """
        return None

    @abstractmethod
    def place(self, y: Tensor) -> Tensor:
        """Put the experts' outputs for the items together to one output.

        Raises:
            ConfigError: If the experts' outputs do not fit their places.
        """

    def total(self, values: Tensor) -> Tensor:
        """What lies in each item of a feature map: (N, n · pixels) to the sums (N · items,).

        Args:
            values: n numbers for every pixel, pixel by pixel, row by row.
        """
        raise NotImplementedError(f'{type(self).__name__} divide no feature map')

    def spread(self, values: Tensor) -> Tensor:
        """The numbers of each item at all of its pixels: (N · items, E) to (N, E, H, W)."""
        raise NotImplementedError(f'{type(self).__name__} divide no feature map')


@dataclass(frozen=True)
class Pixels(Items):
    """Every pixel of one feature map (N, C, H, W), row by row.

    Nothing is copied if the map that is divided has the memory format ``channels_last``.

    Args:
        shape: (N, H, W).
        memory_format: Of the output, ``torch.contiguous_format`` or ``torch.channels_last``.
    """

    shape: tuple[int, int, int]
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def check(cls, layer: 'MoELayer') -> None:
        super().check(layer)
        if layer.experts.take_vectors:
            return
        if layer.whole_maps:
            return
        radius, stride = layer.experts.receptive_field(layer.router.in_channels)
        if radius > 0 or stride > 1:
            raise ConfigError(
                "granularity='pixel' needs experts that see one pixel at a time, but these "
                f'have a receptive field of radius {radius} and stride {stride}; use 1×1 '
                "convolutions, whole_maps=True, or granularity='patch'"
            )

    @classmethod
    def divide(cls, layer: 'MoELayer', x: Tensor) -> 'Pixels':
        check_map(layer, x)
        return cls.of(x)

    @classmethod
    def of(cls, x: Tensor) -> 'Pixels':
        """The pixels of a map, whose output is to have the map's own memory format."""
        return cls((x.shape[0], *x.shape[2:]), memory_format_of(x))

    @classmethod
    def prepare(cls, x: Tensor) -> Tensor:
        """Copied here once: the pixels are then rows, for the router as for the experts."""
        return x.contiguous(memory_format=torch.channels_last)

    def __len__(self) -> int:
        return self.per_image

    @property
    def per_image(self) -> int:
        return self.shape[1] * self.shape[2]

    def pool(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N · H · W, C), at least float32; a pixel is its own mean."""
        return at_least_float32(x.permute(0, 2, 3, 1).flatten(0, 2))

    def crop(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N · H · W, C, 1, 1)."""
        return x.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]

    def locate(self, x: Tensor, y: Tensor) -> Tensor:
        """The pixel that holds a place."""
        _, height, width = self.shape
        return _cell(y, height) * width + _cell(x, width)

    def centres(self) -> Tensor:
        """The middle of every pixel."""
        _, height, width = self.shape
        return grid_centres(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        )

    def borders(self) -> tuple[Tensor, Tensor]:
        """The edges of the pixels."""
        _, height, width = self.shape
        return torch.arange(width + 1) / width, torch.arange(height + 1) / height

    def place(self, y: Tensor) -> Tensor:
        """(N · H · W, C') or (N · H · W, C', 1, 1) to (N, C', H, W).

        Raises:
            ConfigError: If the experts' outputs have another shape.
        """
        if y.dim() not in (2, 4) or tuple(y.shape[2:]) not in ((), (1, 1)):
            raise ConfigError(
                'granularity="pixel" needs experts that make one pixel of one pixel, but an expert '
                f'gave it the shape {tuple(y.shape[1:])}; use 1×1 convolutions without padding, or '
                'LinearExperts'
            )
        y = y.flatten(1).unflatten(0, self.shape).permute(0, 3, 1, 2)
        return y.contiguous(memory_format=self.memory_format)

    def total(self, values: Tensor) -> Tensor:
        """(N, n · H · W) to (N · H · W,)."""
        return values.unflatten(1, (len(self), -1)).sum(2).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """(N · H · W, E) to (N, E, H, W)."""
        return values.unflatten(0, self.shape).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Tokens(Items):
    """Every vector along the last dimension of one input (..., C), in the order of memory.

    Args:
        shape: The dimensions before C; the first one counts as the images.
    """

    shape: tuple[int, ...]

    @classmethod
    def check(cls, layer: 'MoELayer') -> None:
        super().check(layer)
        if not layer.experts.separate_parameters and not layer.experts.take_vectors:
            raise ConfigError(
                f'expert.type={type(layer.experts).__name__} computes feature maps, which '
                "granularity='token' has not; use LinearExperts or MLPExperts"
            )
        if layer.router.needs_maps:
            raise ConfigError(
                f'router.type={type(layer.router).__name__} routes feature maps, which '
                "granularity='token' has not; use mmdet_moe.GAPRouter"
            )
        if layer.decision_weight != 'uniform':
            raise ConfigError(
                f'decision_weight={layer.decision_weight!r} is about feature maps, which '
                "granularity='token' has not; use decision_weight='uniform'"
            )
        if isinstance(layer.experts, ModuleExperts):
            for expert in layer.experts.unlike():
                check_tokenwise(expert, layer.router.in_channels)

    @classmethod
    def divide(cls, layer: 'MoELayer', x: Tensor) -> 'Tokens':
        return cls.of(x)

    @classmethod
    def of(cls, x: Tensor) -> 'Tokens':
        """The tokens of an input.

        Raises:
            ValueError: If it has less than two dimensions.
        """
        if x.dim() < 2:
            raise ValueError(f'tokens need an input of shape (..., C), got {tuple(x.shape)}')
        return cls(tuple(x.shape[:-1]))

    def __len__(self) -> int:
        return self.per_image

    @property
    def per_image(self) -> int:
        return prod(self.shape[1:])

    def pool(self, x: Tensor) -> Tensor:
        """(..., C) to (tokens, C), at least float32; a token is its own mean."""
        return at_least_float32(x.flatten(0, -2))

    def crop(self, x: Tensor) -> Tensor:
        """(..., C) to (tokens, C)."""
        return x.flatten(0, -2)

    def locate(self, x: Tensor, y: Tensor) -> Tensor:
        """Unknown: what a token stands for is known to its owner alone."""
        return torch.full(x.shape, -1, dtype=torch.int64, device=x.device)

    def centres(self) -> Tensor:
        """Unknown."""
        return torch.full((len(self), 2), torch.nan)

    def place(self, y: Tensor) -> Tensor:
        """(tokens, C') to (..., C').

        Raises:
            ConfigError: If the experts' outputs are no vectors.
        """
        if y.dim() != 2:
            raise ConfigError(
                'granularity="token" needs experts that make a vector of a vector, but an expert '
                f'gave it the shape {tuple(y.shape[1:])}; use LinearExperts or MLPExperts'
            )
        return y.unflatten(0, self.shape)


def check_map(layer: 'MoELayer', x: Tensor) -> None:
    """Refuse an input that is no feature map, or one without pixels.

    Raises:
        ConfigError: Naming the layer and the shape.
    """
    if x.dim() != 4:
        raise ConfigError(
            f'MoE layer "{layer.name}" with granularity={layer.granularity!r} takes inputs '
            f'(N, C, H, W), got {tuple(x.shape)}; choose another granularity or path'
        )
    if 0 in x.shape[2:]:
        raise ConfigError(
            f'MoE layer "{layer.name}" is given maps without pixels, {tuple(x.shape)}; give the '
            'model larger images'
        )


def grid_centres(y: Tensor, x: Tensor) -> Tensor:
    """(rows · columns, 2): x and y of every cell of a grid, row by row."""
    return torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1).flatten(0, 1)


def _cell(position: Tensor, cells: int) -> Tensor:
    return (position * cells).long().clamp(0, cells - 1)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32, or float64 if it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
