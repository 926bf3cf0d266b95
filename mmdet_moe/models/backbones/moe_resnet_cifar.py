"""ResNet for images of 32×32 pixels with a mixture of narrow stages (arXiv 2204.10598)."""

import bisect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import ResLayer
from torch import nn

from mmdet_moe.checks import check_indices
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ConvExperts, Experts, MoELayer
from mmdet_moe.moe.flops import count_flops
from mmdet_moe.registry import MODELS

EQUAL_FLOPS = 'equal_flops'
DENSE = 'dense'
#: The least width for ``'equal_flops'``, as a share of the stage's own: experts that cost the same
#: because next to nothing passes through them are not what is asked for.
LEAST_SHARE = 1 / 8
#: By how much k experts of the least width may be dearer than the dense stage.
TOLERANCE = 0.1
#: Side of the map on which costs are compared; even after one stride of 2.
_SIDE = 32


@MODELS.register_module()
class MoEResNet_CIFAR(ResNet_CIFAR):
    """MMPretrain's ``ResNet_CIFAR`` in which a stage, or the first convolution, becomes experts.

    An expert of a stage has the stage's blocks, all but the last one narrow: with n blocks, n − 1
    of ``expert_channels`` channels and one that projects to the channels of the stage. So k active
    experts can cost what the dense stage did. At position 0 the first convolution becomes E
    convolutions of its own size, k of which cost k times what it did. Batch normalisation inside an
    expert sees only the images (or patches) that were routed to it.

    Args:
        *args: As for ``ResNet_CIFAR``.
        **kwargs: As well.
        num_experts: E.
        top_k: k.
        router: Config of each MoE layer's router. Default: ``dict(type='mmdet_moe.GAPRouter')``.
        moe_stages: Which stages become experts, counted from 1; 0 is the first convolution.
        expert_channels: Width of an expert's narrow blocks, counted as ``base_channels`` is: a
            bottleneck has ``expansion`` times as many output channels. A number, or one for each
            stage of the network (the paper: 25, 50, 90, 180). ``'equal_flops'``: as many as make
            ``top_k`` experts cost what the dense stage costs, at least :data:`LEAST_SHARE` of the
            stage's own; not for patches, see ``granularity``. ``'dense'``: experts are copies of
            the whole stage, into which a dense checkpoint loads.
        residual: Add a shortcut around each MoE: the identity, or a strided 1×1 convolution with
            batch norm where the shape changes.
        granularity: ``'image'`` or ``'patch'``, see :class:`~mmdet_moe.moe.MoELayer`. Patches have
            their price: an expert computes each with a halo as wide as it sees. For images of 32×32
            pixels that makes each patch of stages 3 and 4 the whole map, which costs g² times what
            one decision per image does; stage 1 of a ResNet-18 costs 2.25 times as much for g = 2.
        grid_size: g for patches.
        expert_init: Whether each expert starts with its own weights (``'independent'``, as in
            training from scratch) or as a copy of the first one (``'shared'``).
        upcycle_noise: Relative noise on the experts when a dense checkpoint is loaded into them.
        capacity_factor: Bound on an expert's share of the items in training, see
            :class:`~mmdet_moe.moe.MoELayer`.

    Raises:
        ConfigError: For options out of range, and where no width gives equal FLOPs.
    """

    def __init__(
        self,
        *args,
        num_experts: int = 4,
        top_k: int = 2,
        router: dict | None = None,
        moe_stages: int | Sequence[int] = 4,
        expert_channels: int | Sequence[int] | str = EQUAL_FLOPS,
        residual: bool = False,
        granularity: str = 'image',
        grid_size: int = 1,
        expert_init: str = 'independent',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        **kwargs,
    ) -> None:
        _check_numbers(num_experts, top_k)
        # Filled by make_res_layer, which the base class calls from its constructor.
        self._stage_options: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)
        num_stages = len(self.res_layers)
        self.moe_stages = check_indices('moe_stages', moe_stages, 0, num_stages)
        self.expert_channels = _per_stage(expert_channels, num_stages)
        self.residual = residual
        self._moe_cfg = {
            'num_experts': num_experts,
            'top_k': top_k,
            'router': router,
            'granularity': granularity,
            'grid_size': grid_size,
            'expert_init': expert_init,
            'upcycle_noise': upcycle_noise,
            'capacity_factor': capacity_factor,
        }
        for stage in self.moe_stages:
            layer = self._mix_first_conv(self.conv1) if stage == 0 else self._mix_stage(stage)
            name = self.res_layers[stage - 1] if stage else 'conv1'
            layer.stand_for(getattr(self, name))
            setattr(self, name, layer)
        self._freeze_stages()

    def make_res_layer(self, **kwargs) -> nn.Module:
        """Build the next stage, and remember how."""
        self._stage_options.append(kwargs)
        return super().make_res_layer(**kwargs)

    def _mix_first_conv(self, conv: nn.Conv2d) -> MoELayer:
        init_cfg = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        experts = ConvExperts.like(
            conv,
            self._moe_cfg['num_experts'],
            # The backbone's own passes by stacked kernels.
            init_cfg=[cfg for cfg in init_cfg if cfg.get('type') not in (None, 'Pretrained')],
        )
        return self._layer(experts, conv.in_channels, conv.out_channels, conv.stride[0])

    def _mix_stage(self, stage: int) -> MoELayer:
        options = self._stage_options[stage - 1]
        width = self.expert_channels[stage - 1]
        num_groups = self.norm_cfg.get('num_groups', 1)
        if isinstance(width, int) and width % num_groups:
            raise ConfigError(
                f'expert_channels={width} of stage {stage} is no multiple of '
                f'norm_cfg.num_groups={num_groups}; choose a multiple, or {EQUAL_FLOPS!r}'
            )
        if width == DENSE:
            width = options['out_channels'] // options['expansion']
        elif width == EQUAL_FLOPS:
            if self._moe_cfg['granularity'] == 'patch':
                raise ConfigError(
                    f'expert_channels={EQUAL_FLOPS!r} of stage {stage} cannot be told with '
                    "granularity='patch', whose cost depends on the size of the images; give "
                    f'expert_channels as a number, or {DENSE!r}'
                )
            width = _equal_flops_width(stage, options, self._moe_cfg['top_k'])
        experts = [_narrow_stage(width, **options) for _ in range(self._moe_cfg['num_experts'])]
        return self._layer(
            experts, options['in_channels'], options['out_channels'], options['stride']
        )

    def _layer(
        self, experts: Experts | list[nn.Module], in_channels: int, out_channels: int, stride: int
    ) -> MoELayer:
        shortcut = nn.Identity() if self.residual else None
        if self.residual and (in_channels != out_channels or stride > 1):
            conv = build_conv_layer(
                self.conv_cfg, in_channels, out_channels, kernel_size=1, stride=stride, bias=False
            )
            shortcut = nn.Sequential(conv, build_norm_layer(self.norm_cfg, out_channels)[1])
        return MoELayer(experts, in_channels=in_channels, shortcut=shortcut, **self._moe_cfg)


def _check_numbers(num_experts: int, top_k: int) -> None:
    # The router says the same, but only after the widths have been searched with them.
    if not (type(num_experts) is type(top_k) is int and 1 <= top_k <= num_experts):
        raise ConfigError(
            f'num_experts={num_experts!r} and top_k={top_k!r} must be integers with '
            '1 <= top_k <= num_experts'
        )


def _per_stage(
    expert_channels: int | Sequence[int] | str, num_stages: int
) -> tuple[int | str, ...]:
    """The width of each stage's experts, or how to find it."""
    if expert_channels in (EQUAL_FLOPS, DENSE):
        return (expert_channels,) * num_stages
    several = isinstance(expert_channels, Sequence) and not isinstance(expert_channels, str)
    widths = tuple(expert_channels) if several else (expert_channels,) * num_stages
    if len(widths) != num_stages or not all(type(width) is int and width > 0 for width in widths):
        raise ConfigError(
            f'expert_channels={expert_channels!r} must be a positive integer, or one for each of '
            f'the {num_stages} stages, or {EQUAL_FLOPS!r}, or {DENSE!r}'
        )
    return widths


def _narrow_stage(
    width: int,
    *,
    num_blocks: int,
    in_channels: int,
    out_channels: int,
    expansion: int,
    stride: int,
    drop_path_rate: Sequence[float],
    **options: Any,
) -> nn.Sequential:
    """A stage whose blocks but the last have ``width · expansion`` output channels.

    With the dense stage's own width it is that stage, also in the names of its weights.
    """
    narrow = width * expansion
    build = partial(ResLayer, expansion=expansion, **options)
    first = build(
        num_blocks=num_blocks - 1,
        in_channels=in_channels,
        out_channels=narrow,
        stride=stride,
        drop_path_rate=drop_path_rate[:-1],
    )
    last = build(
        num_blocks=1,
        in_channels=narrow,
        out_channels=out_channels,
        stride=1,
        drop_path_rate=drop_path_rate[-1:],
    )
    return nn.Sequential(*first, *last)


def _equal_flops_width(stage: int, options: dict[str, Any], top_k: int) -> int:
    """The width at which ``top_k`` experts come closest to the FLOPs of the dense stage.

    Raises:
        ConfigError: If even the least width costs too much, see :data:`LEAST_SHARE` and
            :data:`TOLERANCE`.
    """
    # Shapes are all that counts: no memory is taken, nothing is computed.
    with torch.device('meta'):
        x = torch.empty(1, options['in_channels'], _SIDE, _SIDE)
        dense = count_flops(ResLayer(**options), x)

        def relative_cost(width: int) -> float:
            return top_k * count_flops(_narrow_stage(width, **options), x) / dense

        full = options['out_channels'] // options['expansion']
        # Group norm divides the channels of each layer.
        step = options['norm_cfg'].get('num_groups', 1)
        least = step * math.ceil(full * LEAST_SHARE / step)
        if (cost := relative_cost(least)) > 1 + TOLERANCE:
            raise ConfigError(
                f'expert_channels={EQUAL_FLOPS!r}: top_k={top_k} experts of stage {stage} cost '
                f'{cost:.2f} times what the dense stage costs even with {least} instead of {full} '
                'channels, because their last block has its full width; give expert_channels as a '
                'number, or lower top_k'
            )
        widths = range(least, full + 1, step)
        above = bisect.bisect_left(widths, 1.0, key=relative_cost)
        candidates = widths[max(above - 1, 0) : above + 1]
        return min(candidates, key=lambda width: abs(relative_cost(width) - 1))
