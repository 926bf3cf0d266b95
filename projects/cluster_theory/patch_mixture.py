"""The mixture of two-layer CNNs of arXiv 2208.02813, and its single experts."""

import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor

from mmdet_moe.checks import check_integer
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.registry import MODELS
from projects.cluster_theory.filter_experts import FilterExperts


@MODELS.register_module()
class PatchMixture(BaseModel):
    """Classifies samples of P patches by ``f(x) = sum_i g_i(x) E_i(x)``, one MoE layer.

    A single model is a mixture of one: with ``num_experts=1`` the router's only weight is 1.

    Args:
        in_channels: d, the numbers of a patch.
        num_classes: Outputs, at least 2.
        num_experts: E.
        top_k: k.
        num_filters: Filters of an expert for each class.
        activation: ``'cubic'`` or ``'linear'``.
        init_scale: Factor on the experts' initial weights.
        router: Config of a :class:`~mmdet_moe.moe.Router`, without the numbers given here.
        loss_on: ``'logits'``: the cross-entropy of the softmax of f, as usual.
            ``'probabilities'``: the softmax of f is put into such a cross-entropy once more, as the
            authors of the paper do. Its smallest value is ``log(1 + (C − 1) / e)``, 0.3133 for
            C = 2 classes, and a sample that is classified with confidence has no gradient at all.
        data_preprocessor: As of MMEngine's ``BaseModel``.

    Raises:
        ConfigError: For options that are unknown, of a wrong type or out of range.
    """

    def __init__(
        self,
        in_channels: int = 50,
        num_classes: int = 2,
        num_experts: int = 8,
        top_k: int = 1,
        num_filters: int = 8,
        activation: str = 'cubic',
        init_scale: float = 1e-3,
        router: dict | None = None,
        loss_on: str = 'logits',
        data_preprocessor: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        if loss_on not in ('logits', 'probabilities'):
            raise ConfigError(f"loss_on={loss_on!r} is unknown; use 'logits' or 'probabilities'")
        # Of a single class the probability is 1, and nothing is learned.
        check_integer(type(self).__name__, 'num_classes', num_classes, least=2)
        self.loss_on = loss_on
        experts = FilterExperts(
            in_channels, num_classes, num_filters, num_experts, activation, init_scale
        )
        self.moe = MoELayer(experts, num_experts, top_k, router, in_channels)

    def forward(
        self,
        inputs: Tensor,
        gt_label: Tensor | None = None,
        cluster: Tensor | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Run the model.

        Args:
            inputs: (N, d, 1, P).
            gt_label: int64 (N,); needed for ``mode='loss'``.
            cluster: int64 (N,), what the samples come from, for metrics.
            mode: ``'tensor'``: f, (N, C). ``'loss'``: the losses. ``'predict'``: for each sample a
                dict of ``pred_score`` (C,) and ``expert_ids`` (k,), and of ``gt_label`` (1,) and
                ``cluster`` (), if known.

        Raises:
            ConfigError: If the patches are not of ``in_channels`` numbers, and for a loss without
                labels.
            ValueError: For another mode.
        """
        if mode not in ('tensor', 'loss', 'predict'):
            raise ValueError(f"mode={mode!r} is unknown; use 'tensor', 'loss' or 'predict'")
        if mode == 'loss' and gt_label is None:
            raise ConfigError(
                "PatchMixture: the batch has no gt_label, which mode='loss' needs; train on data "
                'whose samples have it, as those of mmdet_moe.ClusterPatches'
            )
        in_channels = self.moe.router.in_channels
        if inputs.dim() != 4 or inputs.shape[1] != in_channels:
            raise ConfigError(
                f'PatchMixture: in_channels={in_channels} wants inputs (N, {in_channels}, 1, P), '
                f'got {tuple(inputs.shape)}; set model.in_channels to the patch_dim of the data'
            )
        y = self.moe(inputs)
        if mode == 'tensor':
            return y
        if mode == 'loss':
            scores = y.softmax(1) if self.loss_on == 'probabilities' else y
            return {'loss_cls': F.cross_entropy(scores, gt_label)}
        columns = {'pred_score': y.softmax(1), 'expert_ids': self.moe.routing.expert_ids}
        if gt_label is not None:
            columns['gt_label'] = gt_label[:, None]
        if cluster is not None:
            columns['cluster'] = cluster
        # Plain dicts: a whole data set may be one batch, and data samples take long to make.
        # Each cell is a copy: a row of the whole batch, when pickled, takes all the others along.
        cells = [[cell.clone() for cell in column.unbind()] for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]
