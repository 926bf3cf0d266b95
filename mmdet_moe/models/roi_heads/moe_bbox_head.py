"""Faster R-CNN's box head with mixtures of its shared layers: every RoI chooses its experts."""

import copy
from typing import Any

from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.presets import split_options
from mmdet_moe.moe import MLPExperts, MoELayer
from mmdet_moe.moe.surgery import Site, install
from mmdet_moe.registry import MODELS

SHARED = 'shared_fcs'
#: Options of experts elsewhere, for which this head's own experts have no use.
_NOT_HERE = {'impl', 'residual', 'shared', 'width'}


@MODELS.register_module()
class MoEShared2FCBBoxHead(Shared2FCBBoxHead):
    """``Shared2FCBBoxHead`` whose two shared linear layers become E experts.

    The router decides for every RoI by itself, on the mean of its features. To the MoE layer the
    RoIs are the images. An expert is both layers, each with its ReLU; the predictions of classes
    and boxes are linear layers after it, which all experts share.

    Args:
        *args: As for MMDetection's ``Shared2FCBBoxHead``.
        **kwargs: ``num_experts`` (4), ``top_k`` (2) and other options of
            :class:`~mmdet_moe.moe.MoELayer`, and those of ``Shared2FCBBoxHead``.

    Raises:
        ConfigError: For options out of range, and those that its experts do not have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in sorted(_NOT_HERE & kwargs.keys()):
            raise ConfigError(
                f'MoEShared2FCBBoxHead has no option {name}={kwargs[name]!r}; leave it out'
            )
        if kwargs.get('decision_weight') == 'positives':
            raise ConfigError(
                "MoEShared2FCBBoxHead: decision_weight='positives' counts anchors, of which RoIs "
                "have none; use 'uniform'"
            )
        options, dense = split_options(kwargs, 'mmdet.Shared2FCBBoxHead')
        super().__init__(*args, **dense)
        options = {'num_experts': 4, 'top_k': 2, 'expert_init': 'shared', **options}
        first, last = self.shared_fcs
        experts = MLPExperts(
            first.in_features,
            first.out_features,
            last.out_features,
            options['num_experts'],
            activate_last=True,
        )
        layer = MoELayer(experts, in_channels=self.in_channels, **options)
        # In place of the dense layers: checkpoints of a dense head find it under their name.
        layer.stand_for(SharedFCs(*copy.deepcopy(self.shared_fcs)))
        install(self, [Site(layer, self, SHARED, {})])

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


class SharedFCs(nn.Sequential):
    """The two layers but for their ReLUs, which cost nothing and hold nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))
