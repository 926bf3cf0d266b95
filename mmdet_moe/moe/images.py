"""Image granularity: one decision for each image of one input, a feature map or a sequence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.items import Items, at_least_float32, check_map
from mmdet_moe.moe.patches import PatchGrid
from mmdet_moe.moe.receptive_field import check_images_apart

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer


@dataclass(frozen=True)
class Images(Items):
    """The images of one input without a map: (N, C), or (N, L, C) with L tokens each.

    A feature map (N, C, H, W) is a :class:`PatchGrid` of one patch.
    """

    @classmethod
    def check(cls, layer: 'MoELayer') -> None:
        super().check(layer)
        if isinstance(layer.experts, ModuleExperts):
            for expert in layer.experts.unlike():
                check_images_apart(expert, layer.router.in_channels, layer.batch_dim)

    @classmethod
    def divide(cls, layer: 'MoELayer', x: Tensor) -> Items:
        if x.dim() == 4:
            check_map(layer, x)
            return PatchGrid(tuple(x.shape[-2:]))
        if x.dim() not in (2, 3) or x.shape[-1] != layer.router.in_channels:
            raise ConfigError(
                f'MoE layer "{layer.name}" with granularity=\'image\' takes inputs (N, C, H, W), '
                f'(N, L, C) or (N, C) with C = in_channels = {layer.router.in_channels}, got '
                f'{tuple(x.shape)}; set in_channels, or choose another granularity or path'
            )
        if layer.decision_weight == 'area':
            raise ConfigError(
                f'decision_weight=\'area\' is about feature maps, but MoE layer "{layer.name}" is '
                f"given inputs {tuple(x.shape)}; use decision_weight='uniform'"
            )
        if layer.router.needs_maps:
            raise ConfigError(
                f'router.type={type(layer.router).__name__} routes feature maps, but MoE layer '
                f'"{layer.name}" is given tokens {tuple(x.shape)}; use mmdet_moe.GAPRouter'
            )
        return cls()

    def __len__(self) -> int:
        return 1

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the tokens: (N, C) or (N, L, C) to (N, C)."""
        x = at_least_float32(x)
        return x if x.dim() == 2 else x.mean(1)

    def crop(self, x: Tensor) -> Tensor:
        """Every image is an item as it is."""
        return x

    def locate(self, x: Tensor, y: Tensor) -> Tensor:
        """The only item, wherever the place is."""
        return torch.zeros(x.shape, dtype=torch.int64, device=x.device)

    def centres(self) -> Tensor:
        """The middle of the image."""
        return torch.full((1, 2), 0.5)

    def place(self, y: Tensor) -> Tensor:
        """The outputs are those of the images."""
        return y

    def total(self, values: Tensor) -> Tensor:
        """(N, n) to (N,)."""
        return values.sum(1)
