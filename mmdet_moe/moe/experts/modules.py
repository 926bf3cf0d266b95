"""Experts that are modules of any kind, each with its own weights."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_moe import ops
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.experts.base import Experts
from mmdet_moe.moe.precision import autocast
from mmdet_moe.moe.receptive_field import receptive_field

#: How many routes of one map are evaluated together at most, on a GPU (``impl='auto'``).
MOST_GATHERED = 8
IMPLS = ('auto', 'subbatches', 'gathered')
_CONVOLUTIONS = {getattr(F, f'conv{kind}{d}d') for kind in ('', '_transpose') for d in (1, 2, 3)}


class ModuleExperts(ModuleList, Experts):
    """A list of E modules of the same kind.

    Args:
        modules: The experts, which map (T, ...) to (T, ...).
        impl: How they are evaluated; both ways give the same result up to rounding.
            ``'subbatches'``: each computes its own items, one expert after the other; one without
            items is not evaluated. ``'gathered'``: for each route the weights of its expert are
            gathered, and all routes are computed together (``torch.vmap`` makes one grouped
            convolution of their convolutions): as many operations as the dense layer has, whatever
            E is, and the host waits for nothing. It needs experts without buffers that treat every
            item by itself. ``'auto'``: the second on a GPU for few routes, where the time goes into
            starting operations; see ``docs/dispatch.md``.
        are_copies: Whether the modules differ in nothing but their weights. ``'gathered'`` computes
            what the first one computes, with the weights of the others.

    Raises:
        ConfigError: If ``impl`` is unknown or does not fit.
    """

    def __init__(
        self, modules: Iterable[nn.Module], impl: str = 'auto', are_copies: bool = False
    ) -> None:
        super().__init__(modules)
        if impl not in IMPLS:
            raise ConfigError(f'impl={impl!r} is unknown; use one of {IMPLS}')
        reason = None if are_copies else 'they were given as modules that may differ'
        if any(True for _ in self.buffers()) or any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.modules()
        ):
            reason = 'they have buffers or normalise over their batch'
        if impl == 'gathered' and reason is not None:
            raise ConfigError(
                f"impl='gathered' does not fit these experts: {reason}; use impl='auto'"
            )
        self.impl = impl
        self._can_gather = reason is None
        self._stacked: dict[str, Tensor] | None = None

    @property
    def num_experts(self) -> int:
        return len(self)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """All maps of a forward pass share the stacked weights."""
        try:
            yield
        finally:
            self._stacked = None

    def forward(self, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Experts.forward`; further tensors are items, too, and dispatched likewise."""
        if not args and not kwargs:
            if self._gathers(x_T, dispatcher):
                return self._gathered(x_T, dispatcher)
            return dispatcher.through(x_T, self)
        leaves, spec = tree_flatten((args, kwargs))
        parts = [
            dispatcher.split(dispatcher.dispatch(leaf))
            if isinstance(leaf, Tensor)
            else (leaf,) * len(self)
            for leaf in leaves
        ]
        calls = []
        for expert, own in zip(self, zip(*parts, strict=True), strict=True):
            more, named = tree_unflatten(list(own), spec)
            calls.append(lambda x, f=expert, a=more, k=named: f(x, *a, **k))
        return dispatcher.through(x_T, calls)

    def _gathers(self, x_T: Tensor, dispatcher: Dispatcher) -> bool:
        if self.impl == 'gathered':
            return len(x_T) > 0
        return (
            self.impl == 'auto'
            and self._can_gather
            and x_T.device.type == 'cuda'
            and not torch.is_grad_enabled()
            and not dispatcher.is_whole
            and 0 < dispatcher.expert_ids.numel() <= MOST_GATHERED
            and not any(_is_watched_or_random(part) for expert in self for part in expert.modules())
        )

    def _gathered(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        """Every route by itself, all of them in one batched evaluation of the first expert."""
        if self._stacked is None:
            first = dict(self[0].named_parameters())
            self._stacked = {
                name: autocast(torch.stack([expert.get_parameter(name) for expert in self]))
                for name in first
            }
        ids = dispatcher.expert_ids
        weights_M = {
            name: stacked.index_select(0, ids.flatten()) for name, stacked in self._stacked.items()
        }
        x_M = x_T.repeat_interleave(dispatcher.top_k, dim=0)

        def compute(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self[0], weights, (x[None],))[0]

        with _CastConvolutions() if autocast(x_T).dtype != x_T.dtype else nullcontext():
            y_M = vmap(compute)(weights_M, x_M)
        dispatcher.evaluates_all = True
        # The routes are in the order of the items already.
        places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        return ops.combine(y_M, dispatcher.weights, places)

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        return receptive_field(self[0], in_channels)

    def share_weights(self) -> None:
        for expert in self[1:]:
            expert.load_state_dict(self[0].state_dict())

    def parameters_of(self, expert: int) -> list[nn.Parameter]:
        return list(self[expert].parameters())

    def entries(self) -> dict[str, Tensor]:
        return dict(self[0].state_dict())

    def count(self, state_dict: dict[str, Tensor], prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r'(\d+)\.')
        return len({int(m.group(1)) for m in map(pattern.match, state_dict) if m})

    def store(
        self, state_dict: dict[str, Tensor], prefix: str, name: str, copies: list[Tensor]
    ) -> None:
        for e, value in enumerate(copies):
            state_dict[f'{prefix}{e}.{name}'] = value


class _CastConvolutions(TorchFunctionMode):
    """Autocast for convolutions in ``vmap``, which takes them apart before autocast sees them."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            args = tuple(autocast(a) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


def _is_watched_or_random(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes through, or each item has noise of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (module.training and ('Drop' in type(module).__name__))
    )


def independent_copies(module: nn.Module, num: int) -> list[nn.Module]:
    """The module itself and ``num - 1`` copies whose weights are drawn anew.

    Layers with a ``reset_parameters`` method (all of PyTorch's own) get fresh values, so experts
    differ from the start; further initialisation is the business of MMEngine's ``init_weights``.
    """
    copies = [module] + [copy.deepcopy(module) for _ in range(num - 1)]
    for clone in copies[1:]:
        for layer in clone.modules():
            if callable(getattr(layer, 'reset_parameters', None)):
                layer.reset_parameters()
    return copies
