"""A mixture whose experts are whole classifiers."""

from typing import Any

from mmpretrain.models.classifiers import BaseClassifier
from mmpretrain.structures import DataSample
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, upcycle
from mmdet_moe.registry import MODELS


@MODELS.register_module()
class ClassifierMixture(BaseClassifier):
    """``f(x) = sum_i w_i(x) E_i(x)``: each expert is a network of its own, from image to scores.

    The router looks at the image itself and decides once for it (arXiv 2208.02813, section 6).
    Experts are any classifiers of MMPretrain; what they compute before the softmax is mixed, and
    the loss is taken of the mixture. A single model is a mixture of one: with ``num_experts=1`` the
    only weight is 1.

    The checkpoint of a single classifier, as MMPretrain's ``ImageClassifier`` has it, loads into
    the mixture: each expert gets a copy.

    Args:
        expert: Config of a classifier with a head, built ``num_experts`` times, such as
            ``dict(type='ImageClassifier', backbone=..., neck=..., head=...)``. Its data
            preprocessor and its loss are not used.
        num_experts: E.
        top_k: k.
        in_channels: Channels of the images.
        router: Config of a :class:`~mmdet_moe.moe.Router`, without the numbers given here.
        head: Config of a head without weights of its own, which brings the loss and turns scores
            into predictions. Default: ``dict(type='mmpretrain.ClsHead')``, cross-entropy.
        expert_init: Whether each expert starts with its own weights (``'independent'``) or as a
            copy of the first one (``'shared'``).
        upcycle_noise: Relative noise on the experts when a single classifier is loaded into them.
        capacity_factor: Bound on an expert's share of the images in training, see
            :class:`~mmdet_moe.moe.MoELayer`.
        data_preprocessor: As of MMPretrain's ``ImageClassifier``, for the mixture.
        init_cfg: As of MMEngine's ``BaseModule``.

    Raises:
        ConfigError: For an expert without a head, for a head with weights, and for options out of
            range.
    """

    def __init__(
        self,
        expert: dict,
        num_experts: int = 4,
        top_k: int = 1,
        in_channels: int = 3,
        router: dict | None = None,
        head: dict | None = None,
        expert_init: str = 'independent',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        preprocessor = {'type': 'mmpretrain.ClsDataPreprocessor', **(data_preprocessor or {})}
        super().__init__(init_cfg, MODELS.build(preprocessor))
        self.moe = MoELayer(
            expert,
            num_experts,
            top_k,
            router,
            in_channels,
            expert_init=expert_init,
            upcycle_noise=upcycle_noise,
            capacity_factor=capacity_factor,
        )
        first = next(self.moe.experts.children(), self.moe.experts)
        if not getattr(first, 'with_head', False):
            raise ConfigError(
                f'expert: {type(first).__name__} has no head, so that it gives no scores that '
                "could be mixed; use dict(type='ImageClassifier', backbone=..., neck=..., head=...)"
            )
        self.head = MODELS.build({'type': 'mmpretrain.ClsHead', **(head or {})})
        if any(True for _ in self.head.parameters()):
            raise ConfigError(
                f'head: {type(self.head).__name__} has weights of its own, but what it gets are '
                "scores already, mixed from those of the experts' heads; use one without, such as "
                "dict(type='mmpretrain.ClsHead')"
            )
        self.register_load_state_dict_pre_hook(_upcycle_classifier)

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> Tensor | dict[str, Tensor] | list[DataSample]:
        """Run the model.

        Args:
            inputs: (N, C, H, W).
            data_samples: Those of the images; needed for ``mode='loss'``.
            mode: ``'tensor'``: f, (N, classes). ``'loss'``: the losses. ``'predict'``: the data
                samples with ``pred_score``, ``pred_label`` and ``expert_ids`` (k,).

        Raises:
            ConfigError: If the images do not have ``in_channels`` channels.
            ValueError: For another mode.
        """
        if mode not in ('tensor', 'loss', 'predict'):
            raise ValueError(f"mode={mode!r} is unknown; use 'tensor', 'loss' or 'predict'")
        scores = self.extract_feat(inputs)
        if mode == 'tensor':
            return self.head(scores)
        if mode == 'loss':
            return self.head.loss(scores, data_samples)
        samples = self.head.predict(scores, data_samples)
        for sample, chosen in zip(samples, self.moe.routing.expert_ids, strict=True):
            # A copy, which does not take the whole batch along when it is pickled.
            sample.set_field(chosen.clone(), 'expert_ids')
        return samples

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor]:
        """The mixture's scores (N, classes), as a head takes them."""
        in_channels = self.moe.router.in_channels
        if inputs.dim() != 4 or inputs.shape[1] != in_channels:
            raise ConfigError(
                f'ClassifierMixture: in_channels={in_channels} wants inputs (N, {in_channels}, H, '
                f'W), got {tuple(inputs.shape)}; set model.in_channels to the channels of the '
                'images'
            )
        return (self.moe(inputs),)


def _upcycle_classifier(model: ClassifierMixture, state_dict: dict, prefix: str, *_: Any) -> None:
    layer = model.moe
    upcycle(state_dict, prefix, f'{prefix}moe.', layer.experts, layer.upcycle_noise)
