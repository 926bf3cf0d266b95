"""RetinaNet's head with mixtures of whole subnets (the "predictor MoE" of arXiv 2204.10598)."""

import copy
import logging
from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import RetinaHead
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, upcycle
from mmdet_moe.registry import MODELS

BRANCHES = ('cls', 'reg')


class RetinaSubnet(BaseModule):
    """One expert: the stacked convolutions of a branch and its prediction layer.

    The parts keep the names that they have in ``RetinaHead`` (``cls_convs``, ``retina_cls``, …), so
    initialisation by name and dense checkpoints find them.
    """

    def __init__(self, branch: str, convs: nn.ModuleList, predictor: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.add_module(f'{branch}_convs', convs)
        self.add_module(f'retina_{branch}', predictor)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, anchors · outputs, H, W)."""
        for conv in getattr(self, f'{self.branch}_convs'):
            x = conv(x)
        return getattr(self, f'retina_{self.branch}')(x)


@MODELS.register_module()
class MoERetinaHead(RetinaHead):
    """``RetinaHead`` whose classification and regression subnets become E experts each.

    Every MoE branch has its own router, shared by the pyramid levels, which decides once per image
    and level.

    Args:
        *args, **kwargs: As for MMDetection's ``RetinaHead``.
        num_experts: E.
        top_k: k.
        router: Config of the router of each branch; ``in_channels`` and the numbers above are
            filled in. Default: ``dict(type='mmdet_moe.GAPRouter')``.
        moe_branches: Which subnets become experts: ``('cls',)``, ``('reg',)`` or both.
        decision_weight: What one decision counts in the balancing: ``'uniform'``, ``'area'`` of its
            level, or the number of ``'positives'`` (anchors assigned to objects) in it. See
            :class:`~mmdet_moe.moe.MoELayer`.
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
        moe_branches: str | Sequence[str] = BRANCHES,
        decision_weight: str = 'positives',
        expert_init: str = 'shared',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        **kwargs,
    ) -> None:
        if isinstance(moe_branches, str):
            moe_branches = (moe_branches,)
        if not moe_branches or not set(moe_branches) <= set(BRANCHES):
            raise ConfigError(f"moe_branches={tuple(moe_branches)} must name 'cls', 'reg' or both")
        # Read by _init_layers, which the base class calls from its constructor.
        self.moe_branches = tuple(b for b in BRANCHES if b in moe_branches)
        self._moe_cfg = {
            'num_experts': num_experts,
            'top_k': top_k,
            'router': router,
            'decision_weight': decision_weight,
            'expert_init': expert_init,
            'upcycle_noise': upcycle_noise,
            'capacity_factor': capacity_factor,
        }
        super().__init__(*args, **kwargs)
        self._warn_of_scaled_predictions()
        self._hand_init_overrides_to_experts()
        self.register_load_state_dict_pre_hook(_upcycle_subnets)

    def _init_layers(self) -> None:
        super()._init_layers()
        for branch in self.moe_branches:
            subnet = RetinaSubnet(
                branch, getattr(self, f'{branch}_convs'), getattr(self, f'retina_{branch}')
            )
            delattr(self, f'{branch}_convs')
            delattr(self, f'retina_{branch}')
            moe = MoELayer(subnet, in_channels=self.in_channels, **self._moe_cfg)
            self.add_module(f'{branch}_moe', moe)

    def _warn_of_scaled_predictions(self) -> None:
        router = getattr(self, f'{self.moe_branches[0]}_moe').router
        if router.softmax == 'over_all' and router.num_experts > 1:
            print_log(
                "MoERetinaHead: with softmax='over_all' (the default for top_k=1) the weights of "
                'the experts sum to less than 1 and scale the predictions, the prior of the focal '
                'loss and a loaded dense model included; top_k > 1 with '
                "softmax='over_chosen' keeps them.",
                logger='current',
                level=logging.WARNING,
            )

    def _hand_init_overrides_to_experts(self) -> None:
        """Move ``init_cfg`` overrides of layers that moved into the experts (``retina_cls``)."""
        cfgs = copy.deepcopy(self.init_cfg)
        for cfg in [cfgs] if isinstance(cfgs, dict) else cfgs or []:
            overrides = cfg.get('override')
            if not overrides:
                continue
            overrides = [overrides] if isinstance(overrides, dict) else overrides
            moved = [o for o in overrides if not hasattr(self, o['name'])]
            kept = [o for o in overrides if hasattr(self, o['name'])]
            for override in moved:
                self._init_experts_with({**cfg, 'override': override})
            cfg.pop('override')
            if kept:
                cfg['override'] = kept
        self.init_cfg = cfgs

    def _init_experts_with(self, init_cfg: dict) -> None:
        for branch in self.moe_branches:
            for expert in getattr(self, f'{branch}_moe').experts:
                if hasattr(expert, init_cfg['override']['name']):
                    expert.init_cfg = init_cfg

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for all levels together.

        Args:
            x: Feature maps, each (N, C, H, W).

        Returns:
            ``cls_scores`` and ``bbox_preds``, one map per level, as ``RetinaHead`` returns them.
        """
        return self._forward_branch('cls', x), self._forward_branch('reg', x)

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict for one level, routed by itself."""
        cls_scores, bbox_preds = self.forward((x,))
        return cls_scores[0], bbox_preds[0]

    def _forward_branch(self, branch: str, x: Sequence[Tensor]) -> list[Tensor]:
        if branch in self.moe_branches:
            return getattr(self, f'{branch}_moe')(x)
        outputs = []
        for level in x:
            for conv in getattr(self, f'{branch}_convs'):
                level = conv(level)
            outputs.append(getattr(self, f'retina_{branch}')(level))
        return outputs

    def get_targets(self, *args, **kwargs) -> tuple:
        """As in ``AnchorHead``; on the way it tells the MoE layers where the positives are."""
        targets = super().get_targets(*args, **kwargs)
        if self._moe_cfg['decision_weight'] == 'positives':
            # One (N, anchors) tensor per level, which is the order of a routing's items.
            positives = torch.cat(
                [((lab >= 0) & (lab < self.num_classes)).sum(dim=1) for lab in targets[0]]
            )
            for branch in self.moe_branches:
                getattr(self, f'{branch}_moe').weigh_decisions(positives)
        return targets


def _upcycle_subnets(head: MoERetinaHead, state_dict: dict, prefix: str, *_) -> None:
    for branch in head.moe_branches:
        layer = getattr(head, f'{branch}_moe')
        upcycle(state_dict, prefix, f'{prefix}{branch}_moe.', layer.experts, layer.upcycle_noise)
