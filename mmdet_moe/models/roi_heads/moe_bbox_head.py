"""Faster R-CNN's box head with mixtures of its shared layers: every RoI chooses its experts."""

import copy

from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from torch import Tensor

from mmdet_moe.moe import MLPExperts, MoELayer
from mmdet_moe.registry import MODELS

SHARED = 'shared_fcs'


@MODELS.register_module()
class MoEShared2FCBBoxHead(Shared2FCBBoxHead):
    """``Shared2FCBBoxHead`` whose two shared linear layers become E experts.

    The router decides for every RoI by itself, on the mean of its features. To the MoE layer the
    RoIs are the images. An expert is both layers, each with its ReLU; the predictions of classes
    and boxes are linear layers after it, which all experts share.

    Args:
        *args, **kwargs: As for MMDetection's ``Shared2FCBBoxHead``.
        num_experts: E.
        top_k: k.
        router: Config of the router. Default: ``dict(type='mmdet_moe.GAPRouter')``.
        expert_init: Whether experts start as copies of one another (``'shared'``) or each with its
            own weights (``'independent'``).
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
        expert_init: str = 'shared',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        first, last = self.shared_fcs
        experts = MLPExperts(
            first.in_features,
            first.out_features,
            last.out_features,
            num_experts,
            activate_last=True,
            init_cfg=self._take_init_of_shared_fcs(),
        )
        # In place of the dense layers: checkpoints of a dense head find it under their name.
        self.shared_fcs = MoELayer(
            experts,
            num_experts,
            top_k,
            router,
            in_channels=self.in_channels,
            expert_init=expert_init,
            upcycle_noise=upcycle_noise,
            capacity_factor=capacity_factor,
        )

    def _take_init_of_shared_fcs(self) -> list[dict]:
        """What ``init_cfg`` says of the shared layers, for each expert; its overrides move there.

        Left here, they would initialise the router as well, and the experts as one large layer.
        """
        cfgs = copy.deepcopy(self.init_cfg or [])
        cfgs = [cfgs] if isinstance(cfgs, dict) else cfgs
        moved = []
        for cfg in cfgs:
            overrides = cfg.pop('override', None) or []
            overrides = [overrides] if isinstance(overrides, dict) else overrides
            if cfg.get('layer'):
                moved.append(copy.deepcopy(cfg))
            for override in overrides:
                if override['name'] == SHARED:
                    # Without a type of its own, an override repeats its config for one module.
                    own = {key: value for key, value in override.items() if key != 'name'}
                    moved.append({**(own or cfg), 'layer': 'Linear'})
            kept = [override for override in overrides if override['name'] != SHARED]
            if kept:
                cfg['override'] = kept
        self.init_cfg = cfgs
        return moved

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predict for all RoIs.

        Args:
            x: RoI features, (T, C, h, w).

        Returns:
            ``cls_score`` (T, classes) and ``bbox_pred`` (T, box numbers), None for a prediction
            that the head was built without.
        """
        if self.with_avg_pool:
            x = self.avg_pool(x)
        x = self.shared_fcs(x)
        cls_score = self.fc_cls(x) if self.with_cls else None
        bbox_pred = self.fc_reg(x) if self.with_reg else None
        return cls_score, bbox_pred
