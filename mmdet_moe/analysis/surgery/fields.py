"""Where a config says how many experts a layer has, and how many are chosen."""

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from torch import nn

from mmdet_moe.analysis.models import build_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers

_FIELD, _PARTS = 'num_experts', 'expert_parallel'
#: Keys and numbers from ``cfg.model`` down.
Place = tuple[str | int, ...]


def add_layer_option(parser: argparse.ArgumentParser) -> None:
    """``--layer``, of the tools that change some layers, see :func:`layers_by_field`."""
    parser.add_argument(
        '--layer',
        action='append',
        metavar='NAME',
        help='in this layer alone, may be repeated (default: in all with several experts)',
    )


def layers_by_field(
    cfg: Config, model: nn.Module, names: Sequence[str] | None
) -> dict[Place, dict[str, MoELayer]]:
    """The layers to be changed by name; those together that one dict of the config is about.

    Args:
        cfg: The config.
        model: Its model.
        names: Which layers; None for all with several experts.

    Raises:
        ConfigError: If there is no such layer; if one shares its dict with others that are not
            named; and as :func:`expert_fields`.
    """
    several = {name: m for name, m in find_moe_layers(model).items() if m.num_experts > 1}
    if not several:
        raise ConfigError('the model has no sparse layer with several experts')
    for name in names or ():
        if name not in several:
            raise ConfigError(
                f'--layer {name}: there is no sparse layer of that name; there is '
                f'{", ".join(several)}'
            )
    groups: dict[Place, dict[str, MoELayer]] = defaultdict(dict)
    for name, place in expert_fields(cfg, names or list(several)).items():
        if name in several:
            groups[place][name] = several[name]
    if names:
        groups = {p: g for p, g in groups.items() if not g.keys().isdisjoint(names)}
        for group in groups.values():
            if others := [name for name in group if name not in names]:
                mine = next(name for name in group if name in names)
                raise ConfigError(
                    f'--layer {mine}: it shares num_experts and top_k in the config with '
                    f'{others[0]}; name all layers that do, or give each an entry of its own in '
                    'experts'
                )
    return groups


def expert_fields(cfg: Config, needed: Sequence[str]) -> dict[str, Place]:
    """The dict of a config's model whose ``num_experts`` is that of each sparse layer, by its name.

    It is found out by trying: with another number there, the layer has that number. So it makes no
    difference whether a class takes the number, or an entry of ``experts``, or neither, because it
    is the default; layers of the same dict share it.

    Args:
        cfg: The config.
        needed: Layers whose number has to be found.

    Raises:
        ConfigError: One of them gets its number otherwise.
    """
    known = _sizes(cfg)
    other = max(known.values(), default=0) + 1
    fields: dict[str, Place] = {}
    for place in _candidates(cfg.model, ()):
        changed = copy.deepcopy(cfg)
        node_at(changed, place)[_FIELD] = other
        try:
            sizes = _sizes(changed)
        except Exception:  # of any kind: no such option, or one that contradicts
            continue
        fields |= {name: place for name in known if sizes.get(name) == other}
    if lost := [name for name in needed if name not in fields]:
        raise ConfigError(
            f'the config says nowhere how many experts layer "{lost[0]}" has, so that the layer '
            f'cannot be changed there; say it as {_FIELD} of the module or the entry of experts'
        )
    return fields


def node_at(cfg: Config, place: Place) -> Any:
    """What stands at a place of a config's model."""
    node = cfg.model
    for key in place:
        node = node[key]
    return node


def _sizes(cfg: Config) -> dict[str, int]:
    cfg = copy.deepcopy(cfg)
    for node in _dicts(cfg.model):
        if _PARTS in node:
            node[_PARTS] = 1  # which would have to divide the number
    return {name: layer.num_experts for name, layer in find_moe_layers(build_model(cfg)).items()}


def _dicts(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        yield node
    if isinstance(node, (Mapping, list, tuple)):
        for inner in node.values() if isinstance(node, Mapping) else node:
            yield from _dicts(inner)


def _candidates(node: Any, place: Place) -> Iterator[Place]:
    """The dicts that may hold the number, the inner ones last."""
    if isinstance(node, Mapping):
        kind = node.get('type', '')
        owner = kind if isinstance(kind, str) else getattr(kind, '__module__', '')
        if _FIELD in node or owner.startswith('mmdet_moe.') or 'experts' in place:
            yield place
        for key, value in node.items():
            if key != 'router':
                yield from _candidates(value, (*place, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _candidates(value, (*place, index))
