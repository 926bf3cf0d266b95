"""The config of the dense model behind one with experts."""

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from mmdet_moe.checks import name_of
from mmdet_moe.errors import ConfigError
from mmdet_moe.models.presets import OPTIONS

#: What our classes are without experts, and the options that they alone have.
_DENSE = {
    'MoERetinaHead': ('mmdet.RetinaHead', {'moe_branches'}),
    'MoEFPN': ('mmdet.FPN', {'moe_levels'}),
    'MoEResNet': ('mmdet.ResNet', {'moe_stages'}),
    'MoEShared2FCBBoxHead': ('mmdet.Shared2FCBBoxHead', set()),
    'MoEResNet_CIFAR': ('mmpretrain.ResNet_CIFAR', {'moe_stages', 'expert_channels'}),
}
#: Hooks that want experts.
_HOOKS = ('BalancingLossHook', 'ExpertUtilizationHook')


def dense_config(cfg: Config) -> Config:
    """The config without its experts, their router and the hooks for them.

    Args:
        cfg: The config; left as it was.

    Raises:
        ConfigError: If a class with experts is not known.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = _dense(cfg.model)
    cfg._cfg_dict.pop('router', None)
    if cfg.get('custom_hooks'):
        hooks = [hook for hook in cfg.custom_hooks if name_of(hook.get('type')) not in _HOOKS]
        cfg.custom_hooks = hooks
    return cfg


def _dense(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return type(node)(map(_dense, node))
    if not isinstance(node, Mapping):
        return node
    name = name_of(node.get('type'))
    if name == 'WithExperts':
        node = _without({**node, 'type': node['of']}, {'of', 'experts', 'router'})
        return _dense(node)
    fields = {key: _dense(value) for key, value in node.items()}
    if name in _DENSE:
        kind, own = _DENSE[name]
        return _without({**fields, 'type': kind}, OPTIONS | own)
    if 'num_experts' in node:
        raise ConfigError(
            f'what {name} is without experts is not known; give --dense-config, the config of the '
            'dense model'
        )
    return fields


def _without(fields: Mapping, names: set[str]) -> dict:
    return {key: value for key, value in fields.items() if key not in names}
