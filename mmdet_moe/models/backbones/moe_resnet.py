"""ResNet with mixtures of whole stages (the "feature MoE" of arXiv 2204.10598)."""

from collections.abc import Sequence

from mmdet.models.backbones import ResNet
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.backbones.shortcut import make_shortcut
from mmdet_moe.moe import MoELayer
from mmdet_moe.registry import MODELS


@MODELS.register_module()
class MoEResNet(ResNet):
    """``ResNet`` in which any subset of the stages becomes E experts each.

    An expert is a whole stage. Batch normalisation inside an expert sees only the images (or
    patches) that were routed to it; with ``norm_eval=True``, as in MMDetection's configs, it uses
    the loaded statistics.

    Args:
        *args, **kwargs: As for MMDetection's ``ResNet``.
        num_experts: E.
        top_k: k.
        router: Config of each stage's router. Default: ``dict(type='mmdet_moe.GAPRouter')``.
        moe_stages: Stages that become experts, counted from 1 like ``frozen_stages``.
        residual: Add a shortcut around each MoE stage: the identity, or a strided 1×1 convolution
            with batch norm where the shape changes.
        granularity: ``'image'`` or ``'patch'``, see :class:`~mmdet_moe.moe.MoELayer`.
        grid_size: g for patches.
        expert_init: Whether experts start as copies of one another (``'shared'``, as in the paper)
            or each with its own weights (``'independent'``).
        upcycle_noise: Relative noise on the experts when a dense checkpoint is loaded into them.
        capacity_factor: Bound on an expert's share of the items in training, see
            :class:`~mmdet_moe.moe.MoELayer`.

    Raises:
        ConfigError: For options out of range.
    """

    def __init__(
        self,
        *args,
        num_experts: int = 4,
        top_k: int = 2,
        router: dict | None = None,
        moe_stages: int | Sequence[int] = (4,),
        residual: bool = False,
        granularity: str = 'image',
        grid_size: int = 1,
        expert_init: str = 'shared',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        **kwargs,
    ) -> None:
        # Read by make_res_layer, which the base class calls from its constructor.
        self.moe_stages = (moe_stages,) if isinstance(moe_stages, int) else tuple(moe_stages)
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
        self._next_stage = 1
        super().__init__(*args, **kwargs)
        num_stages = len(self.res_layers)
        if (
            not self.moe_stages
            or not set(self.moe_stages) <= set(range(1, num_stages + 1))
            or len(set(self.moe_stages)) < len(self.moe_stages)
        ):
            raise ConfigError(
                f'moe_stages={self.moe_stages} must name some of the stages 1 to {num_stages}, '
                'each once'
            )

    def make_res_layer(self, **kwargs) -> nn.Module:
        """Build the next stage: dense, or as an MoE layer."""
        stage, self._next_stage = self._next_stage, self._next_stage + 1
        dense = super().make_res_layer(**kwargs)
        if stage not in self.moe_stages:
            return dense
        out_channels = kwargs['planes'] * kwargs['block'].expansion
        shortcut = None
        if self.residual:
            shortcut = make_shortcut(
                kwargs['inplanes'], out_channels, kwargs['stride'], self.conv_cfg, self.norm_cfg
            )
        return MoELayer(dense, in_channels=kwargs['inplanes'], shortcut=shortcut, **self._moe_cfg)
