"""Where a config says how many experts a layer has."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from mmdet_moe.analysis.models import build_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_moe_layers

_FIELD = 'num_experts'
#: Keys and numbers from ``cfg.model`` down.
Place = tuple[str | int, ...]


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
        set_experts(changed, place, other)
        try:
            sizes = _sizes(changed)
        except Exception:  # of any kind: no such option, or one that contradicts
            continue
        fields |= {name: place for name in known if sizes.get(name) == other}
    if lost := [name for name in needed if name not in fields]:
        raise ConfigError(
            f'the config says nowhere how many experts layer "{lost[0]}" has, so that it cannot '
            f'have fewer; say it as {_FIELD} of the module or the entry of experts'
        )
    return fields


def set_experts(cfg: Config, place: Place, num_experts: int) -> None:
    """Set E of the layers of a dict, see :func:`expert_fields`."""
    node: Any = cfg.model
    for key in place:
        node = node[key]
    node[_FIELD] = num_experts


def _sizes(cfg: Config) -> dict[str, int]:
    return {name: layer.num_experts for name, layer in find_moe_layers(build_model(cfg)).items()}


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
