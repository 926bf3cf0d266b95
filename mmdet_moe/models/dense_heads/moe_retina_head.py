"""RetinaNet's head with mixtures of whole subnets (the "predictor MoE" of arXiv 2204.10598)."""

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads import RetinaHead
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.positives import count_positives
from mmdet_moe.models.presets import split_options
from mmdet_moe.moe import add_experts
from mmdet_moe.registry import MODELS

BRANCHES = ('cls', 'reg')


@MODELS.register_module()
class MoERetinaHead(RetinaHead):
    """``RetinaHead`` whose classification and regression subnets become E experts each.

    Every MoE branch has its own router, shared by the pyramid levels, which decides once per image
    and level, or as ``granularity`` says. All levels go through a branch together.

    Args:
        *args: As for MMDetection's ``RetinaHead``.
        moe_branches: Which subnets become experts: ``('cls',)``, ``('reg',)`` or both.
        decision_weight: What one decision counts in the balancing: ``'uniform'``, ``'area'`` of its
            level, or the number of ``'positives'`` (anchors assigned to objects) in it. See
            :class:`~mmdet_moe.moe.MoELayer`.
        **kwargs: Options of :class:`~mmdet_moe.moe.surgery.Entry`, and those of ``RetinaHead``.

    Raises:
        ConfigError: For options out of range.
    """

    def __init__(
        self,
        *args: Any,
        moe_branches: str | Sequence[str] = BRANCHES,
        decision_weight: str = 'positives',
        **kwargs: Any,
    ) -> None:
        if isinstance(moe_branches, str):
            moe_branches = (moe_branches,)
        if not moe_branches or not set(moe_branches) <= set(BRANCHES):
            raise ConfigError(f"moe_branches={tuple(moe_branches)} must name 'cls', 'reg' or both")
        options, dense = split_options(kwargs, 'mmdet.RetinaHead')
        super().__init__(*args, **dense)
        self.moe_branches = tuple(b for b in BRANCHES if b in moe_branches)
        options['decision_weight'] = decision_weight
        places = {b: {'at': f'{{{b}_convs,retina_{b}}}', 'name': f'{b}_moe'} for b in BRANCHES}
        add_experts(self, [{**options, **places[b]} for b in self.moe_branches])
        count_positives(self)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for all levels together.

        Args:
            x: Feature maps, each (N, C, H, W).

        Returns:
            ``cls_scores`` and ``bbox_preds``, one map per level, as ``RetinaHead`` returns them.
        """
        return self._forward_branch('cls', x), self._forward_branch('reg', x)

    def _forward_branch(self, branch: str, x: Sequence[Tensor]) -> list[Tensor]:
        if branch in self.moe_branches:
            return list(getattr(self, f'{branch}_moe')(x))
        outputs = []
        for level in x:
            for conv in getattr(self, f'{branch}_convs'):
                level = conv(level)
            outputs.append(getattr(self, f'retina_{branch}')(level))
        return outputs
