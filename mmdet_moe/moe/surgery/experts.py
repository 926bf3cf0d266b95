"""The experts that take the place of a module, and what has to be known of it first."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts import (
    ConvExperts,
    Experts,
    LinearExperts,
    ModuleExperts,
    StackedExperts,
    independent_copies,
    sheets,
)
from mmdet_moe.moe.experts.conv import is_plain_conv
from mmdet_moe.moe.experts.modules import IMPLS


def make_experts(
    module: nn.Module, num_experts: int, expert_init: str, granularity: str, impl: str
) -> Experts:
    """E experts of a module, the first of which has its weights.

    Convolutions, and linear layers on vectors, are stacked; anything else is copied.

    Args:
        module: It is used up: the first expert, or thrown away.
        num_experts: E.
        expert_init: ``'shared'``: the others are copies; ``'independent'``: with fresh weights.
        granularity: What one decision covers.
        impl: How stacked convolutions are evaluated, see :class:`ConvExperts`, or copies on several
            levels, see :class:`ModuleExperts`.

    Raises:
        ConfigError: If ``impl`` does not fit, or hooks would be lost.
    """
    stacked: StackedExperts
    dense: nn.Conv2d | nn.Linear
    conv, scope = plain_conv(module)
    if conv is not None and granularity != 'token':
        stacked = ConvExperts.like(conv, num_experts, impl=impl)
        stacked.dense_scope, dense = scope, conv
    elif type(module) is nn.Linear and granularity in ('token', 'pixel'):
        if impl != 'auto':
            raise ConfigError(
                f'impl={impl!r}: linear layers have one way of their own; remove impl'
            )
        stacked = LinearExperts(
            module.in_features, module.out_features, num_experts, module.bias is not None
        )
        dense = module
    elif impl not in IMPLS:
        raise ConfigError(
            f'impl={impl!r} is unknown for {type(module).__name__}, which is no plain convolution; '
            f'use one of {IMPLS}'
        )
    else:
        fresh = independent_copies(module, num_experts)
        if expert_init == 'shared':
            for clone in fresh[1:]:
                clone.load_state_dict(module.state_dict())
        copies = ModuleExperts(fresh)
        copies.impl = impl
        return copies
    check_no_hooks(module, dense)
    stacked.to(dense.weight)
    stacked.set_expert(0, dense)
    if expert_init == 'shared':
        stacked.share_weights()
    for name, parameter in dense.named_parameters():
        stacked.get_parameter(name).requires_grad_(parameter.requires_grad)
    return stacked


def check_no_hooks(*modules: nn.Module) -> None:
    """Let modules go whose experts are computed without calling any of them.

    Raises:
        ConfigError: If one has hooks, which nothing would run.
    """
    for module in modules:
        for kind in ('forward', 'forward_pre', 'backward', 'backward_pre'):
            if getattr(module, f'_{kind}_hooks'):
                raise ConfigError(
                    f'{type(module).__name__} has {kind.replace("_", "-")} hooks, which its experts'
                    ' would not run; remove them, and register them on the layer of experts'
                )


def check_sheets(expert: nn.Module, in_channels: int) -> None:
    """Let ``impl='sheets'`` be asked only of an expert that can compute one.

    Raises:
        ConfigError: If it cannot, not even at inference.
    """
    # Batch norm goes level by level in training alone.
    if sheets.margin_of(copy.deepcopy(expert).eval(), in_channels) is None:
        raise ConfigError(
            f"impl='sheets': {type(expert).__name__} cannot compute items side by side on one map, "
            'as it changes the size of maps, pools, normalises over groups or draws random numbers '
            "for whole items; use 'auto'"
        )


def plain_conv(module: nn.Module) -> tuple[nn.Conv2d | None, str]:
    """The convolution that is all there is to a module, and where in it: mmcv wraps them."""
    if is_plain_conv(module):
        return module, ''
    conv = getattr(module, 'conv', None)
    wrapped = all(
        getattr(module, name, True) is False
        for name in ('with_norm', 'with_activation', 'with_explicit_padding', 'with_spectral_norm')
    )
    return (conv, 'conv.') if wrapped and is_plain_conv(conv) else (None, '')


def find_in_channels(module: nn.Module) -> int:
    """The channels that a module takes: those of the first of its layers that says so.

    A layer with weights of its own knows better than what only holds others (MobileNetV2 overwrites
    its ``in_channels`` with those of its last convolution).

    Raises:
        ConfigError: If none does.
    """
    for part in sorted(module.modules(), key=lambda part: not _own(part)):
        for name in ('in_channels', 'in_features', 'num_features', 'num_channels'):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
    raise ConfigError(
        f'cannot tell how many channels {type(module).__name__} takes; give in_channels'
    )


def begins_in_place(module: nn.Module) -> bool:
    """Whether the first layer changes its input."""
    leaves = (part for part in module.modules() if not any(True for _ in part.children()))
    return bool(getattr(next(leaves, None), 'inplace', False))


def make_shortcut(module: nn.Module, in_channels: int) -> nn.Module:
    """What is added around experts (arXiv 2204.10598, the residual variant).

    Returns:
        The identity, or a strided 1×1 convolution and a normalisation like the module's own.

    Raises:
        ConfigError: If the module does not compute a map from a map, or makes it of a size that no
            stride gives.
    """
    side = 64
    dtype = dtype_of(module)
    try:
        twin = copy.deepcopy(module).to('meta')
        twin.eval()  # some classes return nothing
        shape = twin(torch.empty(1, in_channels, side, side, dtype=dtype, device='meta')).shape
        out_channels, stride = shape[1], -(-side // shape[2])
    except Exception as error:
        raise ConfigError(
            f'residual=True needs a module that makes one map of one map, but '
            f'{type(module).__name__} did not: {error}'
        ) from error
    if -(-side // stride) != shape[2]:
        raise ConfigError(
            f'residual=True: the module makes {shape[2]} pixels of {side}, which no shortcut does; '
            'choose one whose convolutions are padded'
        )
    if out_channels == in_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        _norm_like(module, out_channels),
    ).to(dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What the inputs of the module are in."""
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _norm_like(module: nn.Module, channels: int) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.GroupNorm) and channels % part.num_groups == 0:
            return nn.GroupNorm(part.num_groups, channels)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return type(part)(channels)
    return nn.BatchNorm2d(channels)


def sharers(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Modules outside of some paths that have a module or a parameter of theirs, too."""

    def is_inside(name: str) -> bool:
        return any(name == path or name.startswith(path + '.') for path in paths)

    everything = list(model.named_modules(remove_duplicate=False))
    mine: set[int] = set()
    for name, module in everything:
        if is_inside(name):
            mine.add(id(module))
            mine |= {id(p) for p in _own(module)}
    return [
        name or type(model).__name__
        for name, module in everything
        if not is_inside(name) and (id(module) in mine or any(id(p) in mine for p in _own(module)))
    ]


def _own(module: nn.Module) -> list[Tensor]:
    return list(module.parameters(recurse=False))
