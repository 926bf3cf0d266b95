"""Which modules of a model can become experts, found by watching one forward pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.flops import counting
from mmdet_moe.moe.surgery.report import in_columns
from mmdet_moe.moe.surgery.trial import try_as_experts


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
        in_channels: What :func:`add_experts` has to be told, because it cannot tell it; else None.
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
    in_channels: int | None = None
    obstacle: str | None = None


def survey(
    model: nn.Module,
    run: Callable[[], Any],
    places: Sequence[str] = ('',),
    depth: int = 4,
    also: Sequence[Callable[[], Any]] = (),
) -> list[LayerInfo]:
    """List the modules of a model that compute something, in the order of the model.

    What lies inside of experts is left out. Whether another one can become experts is tried:
    :func:`add_experts` has to take it, and they have to compute what it does. That costs a copy of
    the model and as many passes as its modules are nested.

    Args:
        model: Any module; left as it was.
        run: Runs it once, on a batch of at least two images.
        places: Paths below which to look, the modules there included.
        depth: How many names deep below each place; numbers do not count.
        also: Other ways to run it, as for its loss, where it may read what experts have not; one
            that fails is passed by.

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
    for path, info in infos.items():
        if not path:
            info.obstacle = 'is the model'
        elif not any(p.requires_grad for p in found[path].parameters()):
            info.obstacle = info.obstacle or 'is frozen'
    candidates = [info for info in infos.values() if info.calls and not info.obstacle]
    try_as_experts(model, candidates, [run, *also])
    flops = counter.by_module(model)
    alike: dict[str, tuple] = {}
    for path, info in infos.items():
        info.flops = flops.get(path, 0)
        around = infos.get(path.rpartition('.')[0]) if path else None
        if info.calls and not (around and _is_wrapped(info, around)):
            alike[path] = (_glob(path), info.kind, info.calls, *_verdict(info))
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
    return list(groups.values())


def table(infos: Sequence[LayerInfo]) -> str:
    """A survey as text; shares are those of the first entry."""
    parameters, flops = max(infos[0].parameters, 1), max(infos[0].flops, 1)
    lines = [('path', 'layer', 'input', 'output', 'calls', 'parameters', 'GFLOPs', 'experts per')]
    for info in infos:
        ability = ', '.join(info.granularities)
        if info.in_channels:
            ability += f' (in_channels={info.in_channels})'
        if info.obstacle:
            ability = f'not: {info.obstacle.split("; ")[0]}'
        lines.append(
            (
                info.label,
                info.kind,
                _shape(info.inputs),
                _shape(info.output),
                str(info.calls),
                f'{info.parameters / 1e6:.2f} M {info.parameters / parameters:4.0%}',
                f'{info.flops / 1e9:.2f} {info.flops / flops:4.0%}',
                ability,
            )
        )
    return in_columns(lines)


def _is_wrapped(info: LayerInfo, around: LayerInfo) -> bool:
    """Whether a module is all there is to the one that holds it, which is listed already."""
    same = ('parameters', 'calls', 'inputs', 'output')
    return _verdict(info) == _verdict(around) and all(
        getattr(info, name) == getattr(around, name) for name in same
    )


def _verdict(info: LayerInfo) -> tuple:
    """What is found of a module, without names and numbers in the reason."""
    reason = info.obstacle and re.sub(r'".*?"|\(\w+\)|\d+', '', info.obstacle)
    return info.granularities, info.in_channels, reason


def _shape(shape: tuple[int, ...] | None) -> str:
    return '-' if shape is None else '×'.join(map(str, shape))


def _glob(path: str) -> str:
    return '.'.join('*' if name.isdigit() else name for name in path.split('.'))


def _below(model: nn.Module, places: Sequence[str], depth: int) -> Iterator[tuple[str, nn.Module]]:
    layers = [path for path, module in model.named_modules() if isinstance(module, ExpertLayer)]
    for path, module in model.named_modules():
        if any(path.startswith(f'{layer}.') for layer in layers):
            continue
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
        if not isinstance(first, Tensor):
            given = type(first).__name__ if args else 'keywords only'
            info.obstacle = f'its input is no tensor ({given})'
        elif first.dim() < 2:
            info.obstacle = f'its input has the shape {tuple(first.shape)}'
        elif len(results) != 1:
            info.obstacle = f'returns {len(results)} tensors'
        info.inputs = tuple(first.shape) if isinstance(first, Tensor) else None

    return hook
