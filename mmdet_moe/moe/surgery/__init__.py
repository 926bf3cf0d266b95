"""Experts anywhere: the module at a path of any model becomes an MoE layer.

What is built *is* the model that was given, with some modules replaced: all other names in its
state dict, its hooks and its class stay. Dense checkpoints load, each expert gets a copy, and
untrained the model computes what the dense one does.
"""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from mmdet_moe.checks import check_flag, check_integer, check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.distributed import is_distributed, is_sharded
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.expert_parallel import keep_from_ddp
from mmdet_moe.moe.layer import MoELayer
from mmdet_moe.moe.surgery.experts import (
    begins_in_place,
    check_sheets,
    dtype_of,
    find_in_channels,
    make_experts,
    make_shortcut,
    sharers,
)
from mmdet_moe.moe.surgery.factorised import FactorisedEntry
from mmdet_moe.moe.surgery.initialisation import DenseInit, Site
from mmdet_moe.moe.surgery.paths import Place, find_places
from mmdet_moe.moe.surgery.report import Report, report_of
from mmdet_moe.moe.surgery.siblings import Chain, placeholders
from mmdet_moe.moe.surgery.width import equal_width, narrow

__all__ = ['Entry', 'Report', 'Site', 'add_experts', 'install', 'report_of']

EQUAL = 'equal'
#: Attributes of a model that was changed.
_LAYERS, _INIT = '_moe_layers', 'init_weights'
#: By which wrappers run a model of the toolboxes, past its ``__call__``.
_ENTRANCES = ('loss', 'predict', '_forward')


#: Fields of an :class:`Entry` that are integers, and their least values.
_LEAST = {
    **dict.fromkeys(('num_experts', 'top_k', 'grid_size', 'expert_parallel'), 1),
    **dict.fromkeys(('shared', 'batch_dim'), 0),
}


@dataclass(frozen=True)
class Entry:
    """What becomes experts, and how.

    ``num_experts``, ``top_k``, ``router``, ``granularity``, ``grid_size``, ``whole_maps``,
    ``decision_weight``, ``expert_init``, ``upcycle_noise``, ``capacity_factor``, ``batch_dim`` and
    ``expert_parallel`` are those of :class:`~mmdet_moe.moe.MoELayer`.

    Attributes:
        at: Path, see :func:`~mmdet_moe.moe.surgery.paths.find_places`.
        every: Class of the modules below it that are meant, instead of itself.
        in_channels: Channels of the input, where they cannot be told.
        width: How wide an expert is inside. None: as the dense module. A factor above 0.
            ``'equal'``: as makes the k active experts, and the shared ones, cost what the dense
            module does. Each narrow expert starts with a part of the dense module's channels,
            unless ``expert_init='independent'``.
        shared: How many dense experts stand beside them, which every item passes.
        residual: Add a shortcut around the experts.
        impl: How convolutions are evaluated, see :class:`~mmdet_moe.moe.ConvExperts`, or other
            experts on several levels, see :class:`~mmdet_moe.moe.ModuleExperts`.
        name: Of the layer that takes the place of siblings, in the module that holds them. Default:
            the first sibling's name and ``_moe``.
    """

    at: str
    every: str | None = None
    num_experts: int = 4
    top_k: int = 2
    router: dict | None = None
    granularity: str = 'image'
    grid_size: int = 1
    whole_maps: bool = False
    decision_weight: str = 'uniform'
    expert_init: str = 'shared'
    upcycle_noise: float = 0.0
    capacity_factor: float | None = None
    batch_dim: int = 0
    expert_parallel: int = 1
    in_channels: int | None = None
    width: float | str | None = None
    shared: int = 0
    residual: bool = False
    impl: str = 'auto'
    name: str | None = None


def add_experts(
    model: nn.Module,
    experts: Mapping[str, dict] | Sequence[dict | Entry | FactorisedEntry],
    router: dict | None = None,
) -> Report:
    """Turn modules of a model into experts, in place.

    Call it before the optimizer is built, on the CPU or wherever the model is.

    Args:
        model: Any module.
        experts: The options of an :class:`Entry` by path, or a list of them with their ``at``; of
            a :class:`~mmdet_moe.moe.surgery.factorised.FactorisedEntry` where they have a ``type``.
        router: Config of the router of all entries without one of their own.

    Returns:
        All layers of experts of the model, to be printed.

    Raises:
        ConfigError: If a path names no module, or one that cannot become experts, with the reason;
            the model is then as it was.
    """
    entries = [_entry(given, router) for given in _listed(experts)]
    if not entries:
        raise ConfigError("experts is empty; name a layer, such as dict(at='backbone.layer4')")
    places = [
        (entry, place) for entry in entries for place in find_places(model, entry.at, entry.every)
    ]
    check_places(model, [place for _, place in places])
    sites = [build_site(model, entry, place) for entry, place in places]
    install(model, sites)  # nothing can fail any more
    return report_of(model)


def install(model: nn.Module, sites: Sequence[Site]) -> None:
    """Put layers that are built into their places, and let the model tell them when it runs.

    Args:
        model: Its forward pass is what the calls of a layer are collected over, and its
            ``init_weights`` is that of the dense model.
        sites: The places.
    """
    for site in sites:
        _replace(site)
    # A μMoE collects nothing over its calls, and draws its initial weights by itself.
    _watch(model, [site for site in sites if isinstance(site.layer, MoELayer)])
    keep_from_ddp(model)


def _listed(experts: Any) -> list[Any]:
    if isinstance(experts, Mapping):
        if 'at' in experts and isinstance(experts['at'], str):
            return [experts]
        for path, options in experts.items():
            if not isinstance(options, Mapping):
                raise ConfigError(
                    f'experts: {path!r} is given {options!r}; give a dict of options, such as '
                    'dict(num_experts=4)'
                )
        return [{'at': path, **options} for path, options in experts.items()]
    if not isinstance(experts, Sequence) or isinstance(experts, str):
        raise ConfigError(
            f"experts={experts!r} must be a list, such as [dict(at='backbone.layer4')], or a dict "
            'of options by path'
        )
    return list(experts)


def _entry(given: Mapping | Entry, router: dict | None) -> Entry | FactorisedEntry:
    if isinstance(given, (Entry, FactorisedEntry)):
        return given
    known = [field.name for field in fields(Entry)]
    if not isinstance(given, Mapping) or 'at' not in given:
        raise ConfigError(f"experts: {given!r} must be a dict with 'at', the path of a layer")
    if 'type' in given:
        return FactorisedEntry.of(given)
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(
            f'experts: at={given["at"]!r} has unknown options {", ".join(unknown)}; there are '
            f'{", ".join(known)}'
        )
    options = {'router': router, **given}
    if options['router'] is None:
        options['router'] = router
    entry = Entry(**options)
    owner = f'experts: at={entry.at!r}'
    if not isinstance(entry.at, str):
        raise ConfigError(f'{owner} must be a path of the model, such as "backbone.layer4"')
    for field, least in _LEAST.items():
        check_integer(owner, field, getattr(entry, field), least)
    if entry.in_channels is not None:
        check_integer(owner, 'in_channels', entry.in_channels, 1)
    check_number(owner, 'upcycle_noise', entry.upcycle_noise, least=0)
    if entry.capacity_factor is not None:
        check_number(owner, 'capacity_factor', entry.capacity_factor, above=0)
    if entry.width not in (None, EQUAL):
        check_number(f"{owner}: None, '{EQUAL}' or a factor", 'width', entry.width, above=0)
    check_flag(owner, 'residual', entry.residual)
    check_flag(owner, 'whole_maps', entry.whole_maps)
    if entry.name is not None and not (isinstance(entry.name, str) and entry.name.isidentifier()):
        raise ConfigError(f'{owner}: name={entry.name!r} must be a name without dots')
    return entry


def check_places(model: nn.Module, places: list[Place]) -> None:
    """Refuse places that overlap each other, or others of the model that use the same weights.

    Raises:
        ConfigError: With the reason.
    """
    paths: dict[str, Place] = {}
    for place in places:
        for path in place.paths:
            if path in paths:
                raise ConfigError(f'"{path}" is named twice; let one entry of experts name it')
            paths[path] = place
    for path, place in paths.items():
        for other in paths:
            if other.startswith(path + '.'):
                raise ConfigError(
                    f'"{other}" lies inside of "{path}", and both should become experts; experts '
                    'inside of experts are not supported, so name one of the two'
                )
        above = path
        while above:
            above = above.rpartition('.')[0]
            if above and isinstance(model.get_submodule(above), ExpertLayer):
                raise ConfigError(f'"{path}" lies inside of the experts "{above}" already')
        module = model.get_submodule(path)
        if inside := [n for n, m in module.named_modules() if isinstance(m, ExpertLayer)]:
            raise ConfigError(
                f'"{path}" holds the MoE layer "{f"{path}.{inside[0]}".rstrip(".")}" already'
            )
        if model.get_submodule(place.paths[0]) is module and path != place.paths[0]:
            raise ConfigError(
                f'"{place.paths[0]}" and "{path}" are one module with two names, of which only one '
                'would become experts; choose a layer that nothing else uses'
            )
        if shared := sharers(model, place.paths):
            raise ConfigError(
                f'"{place}" shares its weights with "{shared[0]}"'
                f'{f" and {len(shared) - 1} more" if len(shared) > 1 else ""}, which would be left '
                'with weights of its own; choose a layer that nothing else uses'
            )


def _take(model: nn.Module, place: Place) -> nn.Module:
    """A copy of what stands at a place, as one module."""
    modules = [model.get_submodule(path) for path in place.paths]
    if isinstance(modules[0], nn.ModuleDict):
        raise ConfigError(f'"{place}" is a ModuleDict, which nobody calls; name its parts')
    if len(modules) > 1 or isinstance(modules[0], nn.ModuleList):
        chain = Chain(dict(zip(place.names, modules, strict=True)), str(place))
        if not chain.steps:
            raise ConfigError(f'"{place}" is an empty list')
        if any(isinstance(step, (nn.ModuleList, nn.ModuleDict)) for step in chain.steps):
            raise ConfigError(
                f'"{place}" is a list of lists, of which each level or task runs one; name the '
                "lists, as with '.*'"
            )
        return copy.deepcopy(chain)
    return copy.deepcopy(modules[0])


def build_site(model: nn.Module, entry: Entry | FactorisedEntry, place: Place) -> Site:
    """The layer for a place, with a copy of what stands there; the model stays as it was.

    Raises:
        ConfigError: If what stands there cannot become experts, with the reason.
    """
    if isinstance(entry, FactorisedEntry):
        return _build_factorised(model, entry, place)
    module = _take(model, place)
    parameters = list(module.parameters())
    if not parameters:
        raise ConfigError(f'"{place}" ({type(module).__name__}) has no weights to make experts of')
    if begins_in_place(module):
        raise ConfigError(
            f'"{place}" begins with a layer that changes its input in place; set inplace=False '
            'there, or choose the layers behind it'
        )
    try:
        layer, factor = _make_layer(module, entry)
    except ConfigError as error:
        raise ConfigError(f'"{place}": {error}') from error
    levels = getattr(layer.router, '_num_levels', None) or 1
    if levels > 1 and not isinstance(module, Chain):
        raise ConfigError(
            f'"{place}": normalise_levels={levels} is for a layer that gets several feature maps '
            'together, and one by path gets them one by one; remove normalise_levels from its '
            'router, or set it to 1 to normalise all maps alike'
        )
    layer.train(module.training)
    if not any(p.requires_grad for p in parameters):
        layer.requires_grad_(False)
    layer.to(parameters[0].device)
    name = place.names[0]
    stand_ins: dict[str, nn.Module] = {}
    if isinstance(module, Chain):
        layer.siblings = place.names
        name = entry.name or f'{name}_moe'
        if hasattr(model.get_submodule(place.parent), name):
            raise ConfigError(f'name={name!r} is taken in "{place.parent}"; give another name')
        stand_ins = placeholders(layer, module)
    elif entry.name is not None:
        raise ConfigError(
            f'name={entry.name!r} is for siblings in braces; "{place}" keeps its own name'
        )
    layer.name = f'{place.parent}.{name}' if place.parent else name
    if not layer.siblings:
        layer.replaces = type(module).__name__
    layer.width = factor
    if factor != 1 and entry.expert_init == 'shared':
        _take_parts(layer, module)
    layer.stand_for(module)
    _warn_of_scaled_outputs(layer)
    return Site(layer, model.get_submodule(place.parent), name, stand_ins)


def _build_factorised(model: nn.Module, entry: FactorisedEntry, place: Place) -> Site:
    if len(place.names) > 1:
        raise ConfigError(
            f'"{place}" names siblings, of which only sparse experts can be made; remove type, or '
            'name one module'
        )
    (path,) = place.paths
    if isinstance(model.get_submodule(path), nn.ModuleList):
        raise ConfigError(f'"{path}" is a list, which nobody calls; name its parts: "{path}.*"')
    module = _take(model, place)
    try:
        layer = entry.make(module)
    except ConfigError as error:
        # What only adds a shortcut to an MLP (mmcv's FFN) has its weights in one child.
        inner = [name for name, m in module.named_children() if any(True for _ in m.parameters())]
        if len(inner) == 1 and not any(True for _ in module.parameters(recurse=False)):
            return _build_factorised(model, entry, Place(path, tuple(inner)))
        raise ConfigError(f'"{path}": {error}') from error
    parameter = next(module.parameters())
    if not any(p.requires_grad for p in module.parameters()):
        print_log(
            f'{path} is frozen; the μMoE in its place starts anew and is not, but a model that '
            'freezes its layers again in train(), as with frozen_stages, leaves it untrained.',
            logger='current',
            level=logging.WARNING,
        )
    layer.train(module.training).to(parameter)
    layer.name, layer.replaces = path, type(module).__name__
    layer.stand_for(module)
    return Site(layer, model.get_submodule(place.parent), place.names[0], {})


def _take_parts(layer: MoELayer, module: nn.Module) -> None:
    """Narrow experts start with parts of the dense weights, as when a checkpoint is loaded."""
    state = dict(module.state_dict())
    layer.upcycle(state, '', '')
    layer.load_state_dict(state, strict=False)


def _warn_of_scaled_outputs(layer: MoELayer) -> None:
    if layer.router.softmax == 'over_all' and layer.num_experts > 1:
        print_log(
            f"{layer.name}: with softmax='over_all' (the default for top_k=1) the weights of the "
            'experts sum to less than 1 and scale what the layer gives, the prior of a focal loss '
            "and a loaded dense model included; softmax='straight_through' keeps them.",
            logger='current',
            level=logging.WARNING,
        )


def _make_layer(module: nn.Module, entry: Entry) -> tuple[MoELayer, float]:
    in_channels = entry.in_channels or find_in_channels(module)
    shortcut = make_shortcut(module, in_channels) if entry.residual else None
    expert, factor = copy.deepcopy(module), 1.0
    if entry.width is not None:
        x = example(module, in_channels, entry.granularity)
        if isinstance(entry.width, str):
            factor = equal_width(module, x, entry.top_k, entry.shared)
        else:
            factor = entry.width
        expert = narrow(module, x, factor)
    shared = [copy.deepcopy(expert) for _ in range(entry.shared)]
    experts = make_experts(
        expert, entry.num_experts, entry.expert_init, entry.granularity, entry.impl
    )
    if entry.impl == 'sheets':
        spread = entry.expert_parallel != 1
        if spread or entry.whole_maps or entry.granularity not in ('image', 'patch'):
            raise ConfigError(
                "impl='sheets' is for granularity='image' or 'patch', without whole_maps and "
                "expert_parallel; use 'auto'"
            )
        check_sheets(expert, in_channels)
    options = {n: v for n, v in vars(entry).items() if n in inspect.signature(MoELayer).parameters}
    options.update(in_channels=in_channels, shortcut=shortcut, shared=shared)
    return MoELayer(experts, **options), float(factor)


def example(module: nn.Module, in_channels: int, granularity: str) -> torch.Tensor:
    """An input by which the costs of a module and of narrower ones are compared."""
    has_maps = any(isinstance(part, nn.Conv2d) for part in module.modules())
    if has_maps and granularity != 'token':
        return torch.zeros(1, in_channels, 32, 32, dtype=dtype_of(module))
    return torch.zeros(1, 4, in_channels, dtype=dtype_of(module))


def _replace(site: Site) -> None:
    if site.stand_ins:
        for name, stand_in in site.stand_ins.items():
            site.parent._modules[name] = stand_in
        site.parent.add_module(site.name, site.layer)
        site.parent.register_load_state_dict_pre_hook(_upcycle_siblings)
    else:
        site.parent._modules[site.name] = site.layer


def _upcycle_siblings(parent: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    for name, layer in parent.named_children():
        if isinstance(layer, MoELayer) and layer.siblings:
            layer.upcycle(state_dict, prefix, f'{prefix}{name}.')


def _watch(model: nn.Module, sites: list[Site]) -> None:
    """Let the layers know when a forward pass of the model begins and ends."""
    if not sites:
        return
    layers = vars(model).setdefault(_LAYERS, [])
    if not layers:
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end)
        for name in _ENTRANCES:
            method = inspect.getattr_static(type(model), name, None)
            if inspect.isfunction(method) and name not in vars(model):
                vars(model)[name] = Entrance(model, name)
    layers += [site.layer for site in sites]
    if hasattr(model, _INIT):
        if not isinstance(vars(model).get(_INIT), DenseInit):
            vars(model)[_INIT] = DenseInit(model)
        vars(model)[_INIT].sites += sites


class Entrance:
    """Stands in for a method by which a model is run, and tells its layers that it is."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns."""
        layers = vars(self.model)[_LAYERS]
        before = [layer._latest for layer in layers]
        for layer in layers:
            layer.begin(self.name)
        try:
            result = getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        except BaseException:  # such as out of memory, after which the next pass is another one
            for layer in layers:
                layer.forget()
            raise
        for layer, latest in zip(layers, before, strict=True):
            has_run = layer.has_run
            layer.end(self.name)
            if not has_run:  # as a head's loss, of what its forward has decided
                layer._latest = latest
        return result


def _begin(model: nn.Module, _: Any) -> None:
    layers = vars(model)[_LAYERS]
    starts = (getattr(layer.router, 'start', None) for layer in layers if layer.training)
    if is_distributed() and any(start and start.waits for start in starts) and is_sharded(model):
        raise ConfigError(
            "init='kmeans': fully_shard computes with a copy of the router's weights, in which the "
            'start would be lost; begin the training with DDP and go on from its weights, or set '
            "init='normal'"
        )
    for layer in layers:
        layer.begin('forward')


def _end(model: nn.Module, *_: Any) -> None:
    for layer in vars(model)[_LAYERS]:
        layer.end('forward')
