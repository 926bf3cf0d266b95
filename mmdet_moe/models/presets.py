"""Classes of the toolboxes with experts at their usual places, under names of their own.

They are short for :func:`~mmdet_moe.models.with_experts.with_experts` of one part of a model, and
take all options of an entry there: ``num_experts``, ``top_k``, ``router``, ``granularity``, … for
sparse experts, ``num_experts``, ``rank``, ``norm``, ``activation`` and ``budget`` for a μMoE.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmdet_moe.checks import check_indices, fields_of
from mmdet_moe.errors import ConfigError
from mmdet_moe.models.toolboxes import require
from mmdet_moe.moe import add_experts
from mmdet_moe.moe.surgery import Entry
from mmdet_moe.moe.surgery.factorised import KINDS, MUMOE_OPTIONS
from mmdet_moe.registry import MODELS

#: Options of an entry that a preset says itself, or that its class has under the same name.
_NOT_OPTIONS = {'at', 'every', 'name', 'in_channels'}
OPTIONS = {field.name for field in fields(Entry)} - _NOT_OPTIONS


def split_options(
    kwargs: dict[str, Any], dense_type: str, names: Collection[str] = OPTIONS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of experts among keyword arguments, and all others.

    Args:
        kwargs: Of a preset.
        dense_type: Of the dense module, which gets the others.
        names: Of the options.

    Raises:
        ConfigError: For what the dense module does not take, and almost is an option.
    """
    own = {key: value for key, value in kwargs.items() if key in names}
    dense = {key: value for key, value in kwargs.items() if key not in names}
    known = fields_of(MMENGINE_MODELS.get(dense_type))
    for key in sorted(set(dense) - set(known)):
        meant = difflib.get_close_matches(key, [*names, *known], n=1)
        if meant and meant[0] in names:
            raise ConfigError(f"{key}={dense[key]!r} is no option; did you mean '{meant[0]}'?")
    return own, dense


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
    options, dense = split_options(kwargs, 'mmdet.FPN')
    neck = MMENGINE_MODELS.build({**dense, 'type': 'mmdet.FPN'})
    levels = range(len(neck.lateral_convs)) if moe_levels is None else moe_levels
    levels = check_indices('moe_levels', levels, 0, len(neck.fpn_convs) - 1)
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
    options, dense = split_options(kwargs, 'mmdet.ResNet')
    backbone = MMENGINE_MODELS.build({**dense, 'type': 'mmdet.ResNet'})
    stages = check_indices('moe_stages', moe_stages, 1, len(backbone.res_layers))
    add_experts(backbone, [{**options, 'at': f'layer{stage}'} for stage in stages])
    return backbone


@MODELS.register_module('MuMoEClsHead')
def mumoe_cls_head(*, factorisation: str = 'cp', **kwargs: Any) -> nn.Module:
    """``LinearClsHead`` whose linear layer ``fc`` is a μMoE (arXiv 2402.12550).

    Args:
        factorisation: ``'cp'`` or ``'tr'``.
        **kwargs: Options of :class:`~mmdet_moe.moe.CPMuMoE` (``num_experts``; ``rank``, by default
            ``'match'``), and those of MMPretrain's ``LinearClsHead``.

    Raises:
        ConfigError: For options out of range.
    """
    return _with_mumoe('MuMoEClsHead', 'mmpretrain.LinearClsHead', 'fc', factorisation, kwargs)


@MODELS.register_module('MuMoEMlpMixer')
def mumoe_mlp_mixer(*, factorisation: str = 'cp', **kwargs: Any) -> nn.Module:
    """``MlpMixer`` in which both MLPs of every block are μMoEs (arXiv 2402.12550, section 4.3).

    Each has two factorised layers and one gate. In the MLP that mixes tokens, what is gated are the
    channels: a row is one channel at all tokens.

    Args:
        factorisation: ``'cp'`` or ``'tr'``.
        **kwargs: As of :func:`mumoe_cls_head`, with the options of MMPretrain's ``MlpMixer``.

    Raises:
        ConfigError: For options out of range.
    """
    at = 'layers.*.*_mix'  # the token and the channel MLP
    return _with_mumoe('MuMoEMlpMixer', 'mmpretrain.MlpMixer', at, factorisation, kwargs)


def _with_mumoe(
    name: str, dense_type: str, at: str, factorisation: str, kwargs: dict[str, Any]
) -> nn.Module:
    require('mmpretrain', name)
    types = {short: kind for kind, (short, _) in KINDS.items()}
    if factorisation not in types:
        raise ConfigError(
            f'{name}: factorisation={factorisation!r} is unknown; use one of {tuple(types)}'
        )
    options, dense = split_options(kwargs, dense_type, MUMOE_OPTIONS)
    part = MMENGINE_MODELS.build({**dense, 'type': dense_type})
    add_experts(part, [{**options, 'at': at, 'type': types[factorisation]}])
    return part
