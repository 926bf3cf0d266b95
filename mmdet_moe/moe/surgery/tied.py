"""Which dimensions of a module's weights belong together, found by watching one forward pass.

A layer can be made narrower only together with whatever reads and writes the same channels: the
normalisation behind it, the depthwise convolution, the other summand of an addition. Instead of
knowing classes of layers, :func:`trace` watches the operators that PyTorch runs (on the ``meta``
device, where nothing is computed) and ties the dimensions that each of them brings together.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdet_moe.errors import ConfigError

#: Per dimension of a tensor a node of :class:`Tied`, or None: it does not change.
Dims = tuple[int | None, ...]


class Tied:
    """Dimensions that scale together, as a union-find forest.

    All dimensions of a class keep their ratios. So one with sizes 128 and 4 (the channels of a
    grouped convolution, and of each of its groups) changes in quarters: its ``unit`` is 4.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._unit: list[int] = []
        self._fixed: list[bool] = []
        self._maker: list[str | None] = []

    def add(self, size: int) -> int:
        """A new node, by itself."""
        self._parent.append(len(self._parent))
        self._unit.append(size)
        self._fixed.append(False)
        self._maker.append(None)
        return len(self._parent) - 1

    def root(self, node: int) -> int:
        """The node that stands for the class."""
        while self._parent[node] != node:
            node = self._parent[node]
        return node

    def free(self, node: int | None) -> TypeGuard[int]:
        """Whether the dimension may change."""
        return node is not None and not self._fixed[self.root(node)]

    def unit(self, node: int) -> int:
        """In how many equal steps the dimension can be built up."""
        return self._unit[self.root(node)]

    def maker(self, node: int) -> str | None:
        """Name of a weight whose layer makes these channels, if one does."""
        return self._maker[self.root(node)]

    def tie(self, *nodes: int | None) -> int | None:
        """Let them scale together; with one that does not change, none does."""
        roots = [self.root(n) for n in nodes if n is not None]
        fixed = None in nodes or any(self._fixed[r] for r in roots)
        for root in roots[1:]:
            if (first := roots[0]) != root:
                self._parent[root] = first = self.root(first)
                self._unit[first] = math.gcd(self._unit[first], self._unit[root])
                self._maker[first] = self._maker[first] or self._maker[root]
        if fixed and roots:
            self._fixed[self.root(roots[0])] = True
        return roots[0] if roots else None

    def fix(self, nodes: Sequence[int | None]) -> None:
        """Let them stay as they are."""
        for node in nodes:
            self.tie(node, None)

    def keep_multiple(self, node: int | None, size: int, of: int) -> None:
        """Let a dimension of this size stay a multiple."""
        if node is not None:
            root = self.root(node)
            self._unit[root] = math.gcd(self._unit[root], size // of)

    def made_by(self, node: int | None, name: str | None) -> None:
        """Say which weight makes these channels."""
        if node is not None:
            self._maker[self.root(node)] = name


class _Watch(TorchDispatchMode):
    """Ties the dimensions of every tensor that an operator reads or makes."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.tied = Tied()
        self._dims: dict[int, Dims] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's own only as long as it lives
        self._names: dict[int | None, str] = {}
        self.used: set[int] = set()
        self.unknown: list[tuple[Dims, str]] = []
        for name, tensor in named.items():
            if id(tensor) not in self._dims:
                self._set(tensor, tuple(self.tied.add(n) if n > 1 else None for n in tensor.shape))
                self._names.update({n: name for n in self.dims(tensor) if n is not None})

    def dims(self, tensor: Tensor) -> Dims:
        nodes = self._dims.get(id(tensor), (None,) * tensor.dim())
        return tuple(n if self.tied.free(n) else None for n in nodes)

    def _set(self, tensor: Tensor, dims: Sequence[int | None]) -> None:
        self._kept.append(tensor)
        self._dims[id(tensor)] = tuple(
            n if size > 1 else None for n, size in zip(dims, tensor.shape, strict=True)
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.used.update(map(id, tensors))
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(n is not None for t in tensors for n in self.dims(t)) and results:
            name = func._schema.name.removeprefix('aten::')
            follow = getattr(self, f'_{name.strip("_")}', None)
            dims = None
            if torch.Tag.pointwise in func.tags or name == 'copy_':
                dims = self._broadcast(tensors, results[0])
            elif name.endswith('batch_norm') or '_batch_norm_' in name:
                dims = self._norm(args[0], 1, tensors[1:])
            elif follow is not None:
                dims = follow(*args, result=results[0])
            elif all(n is None for t in tensors[1:] for n in self.dims(t)):
                dims = self._like(tensors[0], results[0])
            if dims is None:
                nodes = tuple(n for t in tensors for n in self.dims(t))
                self.unknown.append((nodes, name))
            else:
                self._set(results[0], dims)
                for other in results[1:]:
                    if other.shape == results[0].shape:
                        self._set(other, dims)
        return result

    # Each of these returns the dimensions of the result, or None if it cannot tell them.

    def _broadcast(self, tensors: Sequence[Tensor], result: Tensor) -> Dims:
        dims: list[int | None] = []
        for axis in range(-result.dim(), 0):
            here = [t for t in tensors if t.dim() >= -axis and t.shape[axis] > 1]
            dims.append(self.tied.tie(*(self.dims(t)[axis] for t in here)))
        return tuple(dims)

    def _like(self, x: Tensor, result: Tensor) -> Dims | None:
        """Any operator that takes one tensor and leaves the channels alone: pooling, softmax."""
        dims = self.dims(x)
        if result.dim() != x.dim():
            return None
        changed = (
            n for n, a, b in zip(dims, x.shape, result.shape, strict=True) if b not in (1, a)
        )
        return dims if all(n is None for n in changed) else None

    def _norm(self, x: Tensor, axis: int, vectors: Sequence[Tensor]) -> Dims:
        dims = self.dims(x)
        self.tied.tie(dims[axis], *(self.dims(v)[0] for v in vectors))
        return dims

    def _native_group_norm(self, x: Tensor, weight, bias, n, channels, area, groups, eps, result):
        self.tied.keep_multiple(self.dims(x)[1], channels, groups)
        return self._norm(x, 1, [v for v in (weight, bias) if v is not None])

    def _native_layer_norm(self, x: Tensor, shape, weight, bias, eps, result):
        if weight is None or len(shape) > 1:  # nothing that says how wide it is, or an image
            return None
        return self._norm(x, -1, [v for v in (weight, bias) if v is not None])

    def _multiply(self, a: Dims, b: Dims) -> int | None:
        """Contract the last of ``a`` with the last but one of ``b``; the channels that come out."""
        self.tied.tie(a[-1], b[-2])
        self.tied.made_by(b[-1], self._names.get(b[-1]))
        return b[-1]

    def _mm(self, a: Tensor, b: Tensor, result: Tensor) -> Dims:
        return self.dims(a)[0], self._multiply(self.dims(a), self.dims(b))

    def _addmm(self, bias: Tensor, a: Tensor, b: Tensor, result: Tensor, **_: Any) -> Dims:
        dims = self._mm(a, b, result)
        self.tied.tie(dims[1], self.dims(bias)[-1])
        return dims

    def _bmm(self, a: Tensor, b: Tensor, result: Tensor) -> Dims:
        batch = self.tied.tie(self.dims(a)[0], self.dims(b)[0])
        return batch, self.dims(a)[1], self._multiply(self.dims(a), self.dims(b))

    def _convolution(
        self, x, weight, bias, stride, padding, dilation, transposed, extra, groups, result
    ):
        (batch, channels, *space), (w0, w1, *kernel) = self.dims(x), self.dims(weight)
        self.tied.fix([*space, *kernel])
        if transposed and groups > 1:
            return None
        out = w1 if transposed else w0
        if groups > 1 and weight.shape[1] == 1:  # depthwise: the groups are the channels
            w1 = w0
        elif groups > 1:
            self.tied.keep_multiple(w0, weight.shape[0], groups)
            self.tied.keep_multiple(channels, x.shape[1], groups)
        self.tied.tie(channels, w0 if transposed else w1)
        self.tied.made_by(out, self._names.get(out))
        if bias is not None:
            self.tied.tie(out, self.dims(bias)[0])
        return batch, out, *([None] * len(space))

    def _view(self, x: Tensor, shape: Any, result: Tensor) -> Dims:
        dims: list[int | None] = [None] * result.dim()
        nodes = self.dims(x)
        for old, new in _regions(x.shape, result.shape):
            inside = [n for i in old if (n := nodes[i]) is not None]
            if len(inside) == 1 and len(new) == 1:  # the same, or flattened with constant others
                dims[new[0]] = inside[0]
            else:  # split into the heads of an attention, say, of which only the module knows more
                self.tied.fix(inside)
        return tuple(dims)

    _unsafe_view = _view

    def _permute(self, x: Tensor, order: Sequence[int], result: Tensor) -> Dims:
        return tuple(self.dims(x)[axis] for axis in order)

    def _transpose(self, x: Tensor, a: int, b: int, result: Tensor) -> Dims:
        dims = list(self.dims(x))
        dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)

    def _t(self, x: Tensor, result: Tensor) -> Dims:
        return self.dims(x)[::-1]

    def _unsqueeze(self, x: Tensor, axis: int, result: Tensor) -> Dims:
        dims = list(self.dims(x))
        dims.insert(axis % result.dim(), None)
        return tuple(dims)

    def _squeeze(self, x: Tensor, *_: Any, result: Tensor) -> Dims | None:
        dims = tuple(n for n, size in zip(self.dims(x), x.shape, strict=True) if size > 1)
        return dims if len(dims) == result.dim() else None

    def _expand(self, x: Tensor, *_: Any, result: Tensor, **__: Any) -> Dims:
        return (None,) * (result.dim() - x.dim()) + self.dims(x)

    def _mean(
        self, x: Tensor, axes: Sequence[int] = (), *_: Any, result: Tensor, **__: Any
    ) -> Dims:
        dims = self.dims(x)
        if result.dim() == x.dim():  # those of size 1 do not change
            return dims
        gone = {axis % x.dim() for axis in axes or range(x.dim())}
        return tuple(n for axis, n in enumerate(dims) if axis not in gone)

    _sum = _amax = _mean

    def _select(self, x: Tensor, axis: int, index: int, result: Tensor) -> Dims:
        dims = list(self.dims(x))
        self.tied.fix([dims.pop(axis)])
        return tuple(dims)

    def _cat(self, tensors: Sequence[Tensor], axis: int = 0, *, result: Tensor) -> Dims:
        all_dims = [self.dims(t) for t in tensors]
        dims = [self.tied.tie(*nodes) for nodes in zip(*all_dims, strict=True)]
        if dims[axis] is not None:
            dims[axis] = self.tied.tie(dims[axis], self.tied.add(result.shape[axis]))
        return tuple(dims)


def _regions(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a view come from which, in the smallest groups of equal products; not those
    of size 1."""
    regions, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        here: list[int] = []
        there: list[int] = []
        a = b = 1
        while not (here or there) or a != b:
            if j >= len(new) or (i < len(old) and a <= b):
                here.append(i)
                a, i = a * old[i], i + 1
            else:
                there.append(j)
                b, j = b * new[j], j + 1
        regions.append(([k for k in here if old[k] > 1], [k for k in there if new[k] > 1]))
    return regions


def trace(module: nn.Module, x: Tensor) -> tuple[Tied, dict[str, Dims]]:
    """Tie the dimensions of a module's weights; what its input and output have stays as it is.

    Args:
        module: Any module of one tensor, on any device; left as it was.
        x: Its input, of which only the shape counts.

    Returns:
        The ties, and the nodes of every parameter and buffer by name.

    Raises:
        ConfigError: If an operator stands between the layers whose effect on the channels is
            unknown, or the module cannot be run without values.
    """
    module = copy.deepcopy(module).to('meta')
    module.eval()  # not in a chain: MMPretrain's returns None
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    kind, x = type(module).__name__, x.detach().to('meta')
    watch = _Watch(named)
    try:
        # With gradients, PyTorch's attention does not take its way that hides the operators.
        with torch.enable_grad(), watch:
            output = module(x)
    except ConfigError:
        raise
    except Exception as error:
        text = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ConfigError(
            f'width: the channels of {kind} cannot be followed, because it does not run on shapes '
            f'alone ({text}); leave width out, or choose a path inside of it'
        ) from error
    tied = watch.tied
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            tied.fix(watch.dims(tensor))
    for tensor in named.values():
        if id(tensor) not in watch.used:
            tied.fix(watch.dims(tensor))
    for nodes, operator in watch.unknown:
        for node in nodes:
            if tied.free(node) and (name := tied.maker(node)):
                layer = name.rpartition('.')[0] or kind
                raise ConfigError(
                    f'width: the channels that {layer!r} makes in {kind} go through '
                    f"PyTorch's operator {operator!r}, of which it is unknown how it mixes them; "
                    'leave width out, or choose a path inside of it'
                )
            tied.fix([node])
    return tied, {name: watch.dims(tensor) for name, tensor in named.items()}
