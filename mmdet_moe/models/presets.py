"""Classes of the toolboxes with experts at their usual places, under names of their own.

They are short for :func:`~mmdet_moe.models.with_experts.with_experts` of one part of a model, and
take all options of an entry there (``num_experts``, ``top_k``, ``router``, ``granularity``, …).
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.models.toolboxes import require
from mmdet_moe.moe import add_experts
from mmdet_moe.moe.surgery import Entry
from mmdet_moe.registry import MODELS

#: Options of an entry that a preset says itself, or that its class has under the same name.
_NOT_OPTIONS = {'at', 'every', 'name', 'in_channels'}
OPTIONS = {field.name for field in fields(Entry)} - _NOT_OPTIONS


def split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of experts among keyword arguments, and all others."""
    own = {key: value for key, value in kwargs.items() if key in OPTIONS}
    return own, {key: value for key, value in kwargs.items() if key not in OPTIONS}


@MODELS.register_module('MoEFPN')
def moe_fpn(*, moe_levels: int | Sequence[int] | None = None, **kwargs: Any) -> nn.Module:
    """``FPN`` whose 3×3 output convolutions become E experts each.

    Every chosen level has its own experts and its own router, so each is balanced by itself.

    Args:
        moe_levels: Indices of the output convolutions that become experts, counted from the finest
            level. Default: the ones on laterals, not the strided extra convolutions behind them.
        **kwargs: Options of :class:`~mmdet_moe.moe.surgery.Entry`, and those of MMDetection's
            ``FPN``.

    Raises:
        ConfigError: For options out of range.
    """
    require('mmdet', 'MoEFPN')
    options, dense = split_options(kwargs)
    neck = MMENGINE_MODELS.build({**dense, 'type': 'mmdet.FPN'})
    num_convs = len(neck.fpn_convs)
    levels = range(len(neck.lateral_convs)) if moe_levels is None else moe_levels
    levels = (levels,) if isinstance(levels, int) else tuple(levels)
    if not levels or not set(levels) <= set(range(num_convs)):
        raise ConfigError(
            f'moe_levels={levels} must name some of the {num_convs} output convolutions, 0 to '
            f'{num_convs - 1}'
        )
    add_experts(neck, [{**options, 'at': f'fpn_convs.{level}'} for level in levels])
    return neck


@MODELS.register_module('MoEResNet')
def moe_resnet(*, moe_stages: int | Sequence[int] = (4,), **kwargs: Any) -> nn.Module:
    """``ResNet`` in which any subset of the stages becomes E experts each (arXiv 2204.10598).

    An expert is a whole stage. Batch normalisation inside an expert sees only the images (or
    patches) that were routed to it; with ``norm_eval=True``, as in MMDetection's configs, it uses
    the loaded statistics.

    Args:
        moe_stages: Stages that become experts, counted from 1 like ``frozen_stages``.
        **kwargs: Options of :class:`~mmdet_moe.moe.surgery.Entry`, and those of MMDetection's
            ``ResNet``.

    Raises:
        ConfigError: For options out of range.
    """
    require('mmdet', 'MoEResNet')
    options, dense = split_options(kwargs)
    backbone = MMENGINE_MODELS.build({**dense, 'type': 'mmdet.ResNet'})
    stages = (moe_stages,) if isinstance(moe_stages, int) else tuple(moe_stages)
    num_stages = len(backbone.res_layers)
    if (
        not stages
        or not set(stages) <= set(range(1, num_stages + 1))
        or len(set(stages)) < len(stages)
    ):
        raise ConfigError(
            f'moe_stages={stages} must name some of the stages 1 to {num_stages}, each once'
        )
    add_experts(backbone, [{**options, 'at': f'layer{stage}'} for stage in stages])
    return backbone
