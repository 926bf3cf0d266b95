"""Which modules of a model can become experts, found by watching one forward pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import counting
from mmdet_moe.moe.receptive_field import probe_of, receptive_field
from mmdet_moe.moe.surgery.experts import begins_in_place, find_in_channels, sharers
from mmdet_moe.moe.surgery.report import in_columns


@dataclass
class LayerInfo:
    """One module, or several alike.

    Attributes:
        paths: Where, in the order of the model.
        kind: Its class.
        parameters: Of all of them together.
        flops: Of one forward pass of the model.
        label: A path, or a glob for :func:`add_experts` that names all of them and nothing else.
        calls: How often each is called in one forward pass.
        inputs: Shape of the first input of the first call.
        output: Shape of the first output of the first call.
        granularities: What one decision may cover.
        obstacle: Why it cannot become experts; None if it can.
    """

    paths: list[str]
    kind: str
    parameters: int
    flops: int = 0
    label: str = ''
    calls: int = 0
    inputs: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None
    granularities: tuple[str, ...] = ()
    obstacle: str | None = None


def survey(
    model: nn.Module,
    run: Callable[[], Any],
    places: Sequence[str] = ('',),
    depth: int = 4,
) -> list[LayerInfo]:
    """List the modules of a model that compute something, in the order of the model.

    Args:
        model: Any module; left as it was.
        run: Runs it once, on a batch of at least two images.
        places: Paths below which to look, the modules there included.
        depth: How many names deep below each place; numbers do not count.

    Returns:
        First the model itself. Modules of the same class and abilities in a numbered list are one
        entry.
    """
    found = dict(_below(model, places, depth))
    infos = {
        path: LayerInfo([path], type(module).__name__, sum(p.numel() for p in module.parameters()))
        for path, module in found.items()
    }
    hooks = [
        module.register_forward_hook(_note(infos[path]), with_kwargs=True)
        for path, module in found.items()
    ]
    try:
        with counting(model) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    flops = counter.by_module(model)
    alike: dict[str, tuple] = {}
    for path, info in infos.items():
        info.flops = flops.get(path, 0)
        info.obstacle = _obstacle(model, found[path], info)
        around = infos.get(path.rpartition('.')[0]) if path else None
        if info.calls and not (around and _is_wrapped(info, around)):
            reason = info.obstacle and re.sub('".*"', '', info.obstacle)
            alike[path] = (_glob(path), info.kind, info.calls, reason)
    everywhere = Counter(_glob(path) for path, _ in model.named_modules(remove_duplicate=False))
    numbers = Counter(alike.values())
    groups: dict[tuple, LayerInfo] = {}
    for path, key in alike.items():
        is_whole = numbers[key] == everywhere[key[0]]  # the glob names nothing else
        info = infos[path]
        group = groups.setdefault(key if is_whole else (*key, info.parameters), info)
        if group is not info:
            group.paths.append(path)
            group.parameters += info.parameters
            group.flops += info.flops
        number, first = len(group.paths), group.paths[0]
        group.label = first or '(all)'
        if number > 1:
            group.label = f'{key[0]} ({number})' if is_whole else f'{first} (+{number - 1} alike)'
    for group in groups.values():
        if group.obstacle is None and group.inputs is not None:
            group.granularities = _granularities(found[group.paths[0]], group.inputs)
    return list(groups.values())


def table(infos: Sequence[LayerInfo]) -> str:
    """A survey as text; shares are those of the first entry."""
    parameters, flops = max(infos[0].parameters, 1), max(infos[0].flops, 1)
    lines = [('path', 'layer', 'input', 'output', 'calls', 'parameters', 'GFLOPs', 'experts per')]
    for info in infos:
        lines.append(
            (
                info.label,
                info.kind,
                _shape(info.inputs),
                _shape(info.output),
                str(info.calls),
                f'{info.parameters / 1e6:.2f} M {info.parameters / parameters:4.0%}',
                f'{info.flops / 1e9:.2f} {info.flops / flops:4.0%}',
                f'not: {info.obstacle}' if info.obstacle else ', '.join(info.granularities),
            )
        )
    return in_columns(lines)


def _is_wrapped(info: LayerInfo, around: LayerInfo) -> bool:
    """Whether a module is all there is to the one that holds it, which is listed already."""
    same = ('calls', 'inputs', 'output', 'obstacle')
    return info.parameters == around.parameters and all(
        getattr(info, name) == getattr(around, name) for name in same
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return '-' if shape is None else '×'.join(map(str, shape))


def _glob(path: str) -> str:
    return '.'.join('*' if name.isdigit() else name for name in path.split('.'))


def _below(model: nn.Module, places: Sequence[str], depth: int) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        dotted = path and f'.{path}'
        below = [
            dotted.removeprefix(p)
            for p in (f'.{place}'.rstrip('.') for place in places)
            if f'{dotted}.'.startswith(f'{p}.')
        ]
        deep = [sum(not name.isdigit() for name in inside.split('.')) - 1 for inside in below]
        # Not normalisation by itself, which can become experts, but has nothing to share out.
        computes = any(p.dim() > 1 for p in module.parameters())
        if not path or (computes and deep and min(deep) <= depth):
            yield path, module


def _note(info: LayerInfo) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        info.calls += 1
        if info.calls > 1:
            return
        first = args[0] if args else None
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        info.output = tuple(results[0].shape) if results else None
        others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
        if not isinstance(first, Tensor):
            given = type(first).__name__ if args else 'keywords only'
            info.obstacle = f'its input is no tensor ({given})'
        elif others and any(t.dim() == 0 or len(t) != len(first) for t in others):
            info.obstacle = f'takes {1 + len(others)} tensors, not all of the same items'
        elif len(results) != 1:
            info.obstacle = f'returns {len(results)} tensors'
        info.inputs = tuple(first.shape) if isinstance(first, Tensor) else None

    return hook


def _obstacle(model: nn.Module, module: nn.Module, info: LayerInfo) -> str | None:
    if not info.paths[0]:
        return 'is the model'
    if info.obstacle:
        return info.obstacle
    if shared := sharers(model, info.paths):
        return f'shares its weights with "{shared[0]}"'
    if begins_in_place(module):
        return 'begins in place'
    if not any(p.requires_grad for p in module.parameters()):
        return 'is frozen'
    return None


def _granularities(module: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    try:
        channels = find_in_channels(module)
    except ConfigError:
        channels = 0
    is_last = shape[-1] == channels and (len(shape) < 4 or shape[1] != channels)
    if len(shape) == 4 and not is_last:
        try:
            reach = receptive_field(module, shape[1])
        except ConfigError:
            return ('image',)
        return ('image', 'patch', 'pixel') if reach == (0, 1) else ('image', 'patch')
    fits = ('image',) if len(shape) in (2, 3) else ()
    return (*fits, 'token') if _is_tokenwise(module, shape) else fits


def _is_tokenwise(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a token reaches no other: a NaN in one of them shows in no other."""
    x = torch.ones(shape, dtype=torch.float64)
    tokens = x.view(-1, shape[-1])
    if len(tokens) < 2:
        return False
    tokens[1] = torch.nan
    try:
        with torch.no_grad():
            y = probe_of(module)(x)
    except Exception:  # of any kind: the module is the user's
        return False
    y = next((t for t in tree_leaves(y) if isinstance(t, Tensor)), None)
    if y is None or y.shape[:-1] != x.shape[:-1]:
        return False
    hit = y.isnan().flatten(0, -2).any(1)
    return bool(hit[1]) and int(hit.sum()) == 1
