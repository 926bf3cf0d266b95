"""Narrow experts: the same inputs and outputs as a dense module, fewer channels in between."""

import bisect
import copy

import torch
from torch import Tensor, nn

from mmdet_moe.checks import check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import count_flops
from mmdet_moe.moe.surgery.tied import Dims, Tied, trace

#: The least width for equal cost, as a share of the module's own: experts that cost the same
#: because next to nothing passes through them are not what is asked for.
LEAST_SHARE = 1 / 8


def narrow(module: nn.Module, x: Tensor, factor: float) -> nn.Module:
    """A fresh module like this one, in which every inner width is ``factor`` of what it was.

    A width is inner if it is tied neither to the input nor to the output: by a residual connection
    or a depthwise convolution, say. Each is rounded to what group norm and grouped convolutions can
    divide, and is at least that. Attention keeps its width, for only its code knows its heads.

    Args:
        module: From one tensor to one tensor, or several; left as it was. ``reset_parameters``
            draws the weights of the new one, where its layers have it; bare parameters keep the
            values of the channels that are left.
        x: An input of the module, of which only the shape counts.
        factor: Above 0, at most 1.

    Returns:
        On the module's device and with its ``training`` and ``requires_grad``.

    Raises:
        ConfigError: For a factor out of range; if nothing inside can be narrower; if an operator
            between the layers is unknown.
    """
    check_number('experts', 'width', factor, above=0)
    if factor > 1:
        raise ConfigError(f'experts: width={factor!r} must be at most 1, the width of the module')
    tied, dims = trace(module, x)
    _check_inner(module, tied, dims)
    twin = _cut(copy.deepcopy(module), tied, dims, factor)
    _check_runs(twin, module, x, factor)
    for layer in twin.modules():
        reset = getattr(layer, 'reset_parameters', None)
        if callable(reset):
            reset()
    return twin


def equal_width(
    module: nn.Module, x: Tensor, top_k: int, shared: int = 0, tolerance: float = 0.1
) -> float:
    """The factor for :func:`narrow` at which the active experts cost what the module costs.

    Args:
        module, x: As for :func:`narrow`. The shape of ``x`` may matter a little, for what costs
            the same for every input weighs less on large ones.
        top_k: k, the routed experts that are active.
        shared: Experts that every item passes.
        tolerance: By how much the experts may be dearer than the module at the least width,
            :data:`LEAST_SHARE`.

    Returns:
        Of all factors that make a difference, the one that comes closest in FLOPs.

    Raises:
        ConfigError: As for :func:`narrow`, and if even the least width is too dear.
    """
    tied, dims = trace(module, x)
    steps = _check_inner(module, tied, dims)
    x, on_meta = x.to('meta'), copy.deepcopy(module).to('meta')
    dense, active = count_flops(on_meta, x), top_k + shared

    def relative_cost(step: int) -> float:
        twin = _cut(copy.deepcopy(on_meta), tied, dims, step / steps)
        return active * count_flops(twin, x) / dense

    least = max(1, round(steps * LEAST_SHARE))
    if (cost := relative_cost(least)) > 1 + tolerance:
        also = f' and {shared} shared' if shared else ''
        raise ConfigError(
            f"width='equal': top_k={top_k}{also} experts like {type(module).__name__} cost "
            f'{cost:.2f} times what it costs even at {least / steps:.3g} of its inner width, '
            'because its first and last layer keep the width of what they are connected to; give '
            'width as a number, or lower top_k'
        )
    candidates = range(least, steps + 1)
    above = bisect.bisect_left(candidates, 1.0, key=relative_cost)
    nearest = candidates[max(above - 1, 0) : above + 1]
    return min(nearest, key=lambda step: abs(relative_cost(step) - 1)) / steps


def _check_inner(module: nn.Module, tied: Tied, dims: dict[str, Dims]) -> int:
    """In how many steps the widest of the inner widths can be built up.

    Raises:
        ConfigError: If there is none.
    """
    units = [tied.unit(n) for nodes in dims.values() for n in nodes if tied.free(n)]
    if max(units, default=1) == 1:
        raise ConfigError(
            f'width: nothing inside {type(module).__name__} can be narrower, for every width is '
            'tied to its input or its output; leave width out, or choose a path with several '
            'layers in a row'
        )
    return max(units)


def _cut(twin: nn.Module, tied: Tied, dims: dict[str, Dims], factor: float) -> nn.Module:
    """Cut all parameters and buffers to size, in place."""
    done: dict[int, Tensor] = {}
    changed = []
    for name, nodes in dims.items():
        path, _, entry = name.rpartition('.')
        layer = twin.get_submodule(path)
        old = getattr(layer, entry)
        shape = [
            size * max(1, round(factor * tied.unit(n))) // tied.unit(n) if tied.free(n) else size
            for n, size in zip(nodes, old.shape, strict=True)
        ]
        if id(old) not in done:
            new = old.detach()[tuple(slice(n) for n in shape)].clone()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            done[id(old)] = new
        setattr(layer, entry, done[id(old)])
        if list(old.shape) != shape and entry == 'weight':
            changed.append((layer, old.shape, done[id(old)].shape))
    for layer, before, after in changed:
        _tell_width(layer, before, after)
    for part in twin.modules():  # mmcv's ConvModule repeats what its convolution says
        if isinstance(conv := getattr(part, 'conv', None), nn.Module):
            for field in ('in_channels', 'out_channels'):
                if hasattr(part, field) and hasattr(conv, field):
                    setattr(part, field, getattr(conv, field))
    return twin


def _tell_width(layer: nn.Module, old: torch.Size, new: torch.Size) -> None:
    """Bring the numbers of a layer in line with its weight, whose shape was ``old``."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        makes, takes = (1, 0) if layer.transposed else (0, 1)
        if layer.groups > 1 and old[1] == 1:
            layer.groups = layer.groups * new[0] // old[0]
        layer.out_channels = layer.out_channels * new[makes] // old[makes]
        layer.in_channels = layer.groups * new[takes] if takes else new[takes]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = new
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(new)
    for field in ('num_features', 'num_channels'):
        if hasattr(layer, field):
            setattr(layer, field, new[0])


def _check_runs(twin: nn.Module, module: nn.Module, x: Tensor, factor: float) -> None:
    """Run both on shapes alone, to see whether the narrow one does what it should.

    Raises:
        ConfigError: If it does not.
    """
    shapes = []
    for one in (module, twin):
        one = copy.deepcopy(one).to('meta')
        one.eval()
        try:
            with torch.no_grad():
                output = one(x.detach().to('meta'))
        except Exception as error:
            output = error
        shapes.append(torch.utils._pytree.tree_map(lambda t: getattr(t, 'shape', t), output))
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f'width={factor:g}: {type(module).__name__} does not run with narrower layers inside '
            f'({shapes[1]!r}), because its code relies on their widths; leave width out, or choose '
            'a path inside of it'
        )
