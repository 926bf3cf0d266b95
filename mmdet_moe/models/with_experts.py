"""Experts in any model that a config describes: the config-level front of ``add_experts``."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.positives import count_positives
from mmdet_moe.moe import add_experts
from mmdet_moe.registry import MODELS


@MODELS.register_module('WithExperts')
def with_experts(
    of: str | type,
    experts: Mapping[str, dict] | Sequence[dict],
    router: dict | None = None,
    **dense: Any,
) -> nn.Module:
    """Build a model, then turn modules of it into experts.

    Every other field of the dense model stays where it was::

        _base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                  'mmdet_moe::_base_/balancing/soft_importance.py']
        model = dict(type='mmdet_moe.WithExperts', of='RetinaNet', router={{_base_.router}},
                     experts=[dict(at='backbone.layer4', num_experts=4, top_k=2)])

    Args:
        of: What the ``type`` of the dense model was.
        experts: What becomes experts; see :class:`~mmdet_moe.moe.surgery.Entry` for the options.
        router: Config of the router of all entries without one of their own.
        **dense: All other fields of the dense model.

    Returns:
        The dense model itself, an ``of``, with experts in it.

    Raises:
        ConfigError: If ``of`` is no model, or an entry of ``experts`` does not fit.
    """
    if of is None or (isinstance(of, str) and of.split('.')[-1] == 'WithExperts'):
        raise ConfigError(
            f"model.of={of!r} must be the type of the dense model, such as 'RetinaNet'"
        )
    model = MMENGINE_MODELS.build({**dense, 'type': of})
    add_experts(model, experts, router)
    count_positives(model)
    return model
