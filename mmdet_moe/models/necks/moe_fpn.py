"""FPN with mixtures of output convolutions."""

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmdet.models.necks import FPN
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ConvExperts, MoELayer
from mmdet_moe.registry import MODELS


@MODELS.register_module()
class MoEFPN(FPN):
    """``FPN`` whose 3×3 output convolutions become E experts each.

    Every chosen level has its own experts and its own router, so each is balanced by itself.

    Args:
        *args, **kwargs: As for MMDetection's ``FPN``.
        num_experts: E.
        top_k: k.
        router: Config of each router. Default: ``dict(type='mmdet_moe.GAPRouter')``.
        moe_levels: Indices of the output convolutions that become experts, counted from the finest
            level. Default: the ones on laterals, not the strided extra convolutions behind them.
        granularity: ``'image'`` or ``'patch'``, see :class:`~mmdet_moe.moe.MoELayer`.
        grid_size: g for patches.
        expert_init: Whether experts start as copies of one another (``'shared'``, as in the paper)
            or each with its own weights (``'independent'``).
        upcycle_noise: Relative noise on the experts when a dense checkpoint is loaded into them.
        capacity_factor: Bound on an expert's share of the items in training, see
            :class:`~mmdet_moe.moe.MoELayer`.
        impl: How experts that are plain convolutions (no normalisation, no activation) are
            evaluated, see :class:`~mmdet_moe.moe.ConvExperts`.

    Raises:
        ConfigError: For options out of range.
    """

    def __init__(
        self,
        *args,
        num_experts: int = 4,
        top_k: int = 2,
        router: dict | None = None,
        moe_levels: int | Sequence[int] | None = None,
        granularity: str = 'image',
        grid_size: int = 1,
        expert_init: str = 'shared',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        impl: str = 'auto',
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        num_convs = len(self.fpn_convs)
        if moe_levels is None:
            moe_levels = range(len(self.lateral_convs))
        if isinstance(moe_levels, int):
            moe_levels = (moe_levels,)
        if not moe_levels or not set(moe_levels) <= set(range(num_convs)):
            raise ConfigError(
                f'moe_levels={tuple(moe_levels)} must name some of the {num_convs} output '
                f'convolutions, 0 to {num_convs - 1}'
            )
        for level in moe_levels:
            conv = self.fpn_convs[level]
            self.fpn_convs[level] = MoELayer(
                self._experts(conv, num_experts, impl),
                num_experts,
                top_k,
                router,
                in_channels=conv.conv.in_channels,
                granularity=granularity,
                grid_size=grid_size,
                expert_init=expert_init,
                upcycle_noise=upcycle_noise,
                capacity_factor=capacity_factor,
            )

    def init_weights(self) -> None:
        """Initialise as ``FPN`` does, which does not reach into its list of convolutions itself."""
        first_call = not self.is_init
        super().init_weights()
        # What has been loaded stays as it is.
        if first_call and not any(cfg['type'] == 'Pretrained' for cfg in self._init_cfgs()):
            for layer in self.fpn_convs:
                if isinstance(layer, MoELayer):
                    if isinstance(layer.experts, ConvExperts):
                        layer.experts.init_weights()
                    layer.share_initial_weights()

    def _init_cfgs(self) -> list[dict]:
        return [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or ())

    def _experts(self, conv: ConvModule, num_experts: int, impl: str) -> nn.Module:
        if conv.with_norm or conv.with_activation or type(conv.conv) is not nn.Conv2d:
            if impl != 'auto':
                raise ConfigError(
                    f'impl={impl!r} is for plain convolutions, but these have a normalisation or '
                    'an activation; remove impl'
                )
            return conv
        # Of one convolution: what is said of other modules of the neck does not concern it.
        init_cfg = [
            {key: value for key, value in cfg.items() if key != 'override'}
            for cfg in self._init_cfgs()
            if cfg.get('layer')
        ]
        experts = ConvExperts.like(conv.conv, num_experts, impl=impl, init_cfg=init_cfg or None)
        experts.dense_scope = 'conv.'
        return experts
