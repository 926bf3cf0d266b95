"""Experts that are modules of any kind, each with its own weights."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_moe.moe.dispatcher import Dispatcher, Sorting
from mmdet_moe.moe.distributed import is_distributed, is_sharded
from mmdet_moe.moe.experts import sheets
from mmdet_moe.moe.experts.base import Experts
from mmdet_moe.moe.receptive_field import receptive_field


class ModuleExperts(ModuleList, Experts):
    """A list of E modules of the same kind. Each computes its items as one sub-batch; one without
    items is not evaluated.

    Batch norms take their statistics from the items of their expert. Where that is one value per
    channel, a single item on a 1×1 map, they use the running statistics, as at inference.

    Args:
        modules: The experts, which map (T, ...) to (T, ...).
    """

    def __init__(self, modules: Iterable[nn.Module], **kwargs: Any) -> None:
        super().__init__(modules, **kwargs)
        #: How several levels are computed: ``'levels'`` (one after the other), ``'sheets'``
        #: (together), or ``'auto'`` (what is faster).
        self.impl = 'auto'
        # On sheets, by what the experts are; None for such as cannot compute any.
        self._margins: dict[tuple, int | None] = {}
        for module in self.modules():
            # Once: it may have been in a list of experts before, or be in a layer inside of one.
            if isinstance(module, _BatchNorm) and not hasattr(module, 'rests'):
                module.rests = False  # type: ignore[assignment]  # of ours, on PyTorch's module
                module.register_forward_pre_hook(_rest_on_a_single_value)
                module.register_forward_hook(_go_on)

    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(self, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Experts.forward`; further tensors are items, too, and dispatched likewise."""
        entered = self.entered(dispatcher)
        if not args and not kwargs:
            return dispatcher.through(x_T, self, entered)
        leaves, spec = tree_flatten((args, kwargs))
        parts = [
            dispatcher.split(dispatcher.dispatch(leaf))
            if isinstance(leaf, Tensor)
            else (leaf,) * len(self)
            for leaf in leaves
        ]
        experts: list[nn.Module] = list(self)
        calls = []
        for expert, own in zip(experts, zip(*parts, strict=True), strict=True):
            more, named = tree_unflatten(list(own), spec)
            calls.append(lambda x, f=expert, a=more, k=named: f(x, *a, **k))
        return dispatcher.through(x_T, calls, entered)

    def joins_levels(self, maps: Sequence[Tensor]) -> bool:
        """On a GPU, where starting many small operations takes longer than sheets' margins."""
        if self.impl == 'auto':
            return maps[0].is_cuda
        return self.impl == 'sheets'

    def join_levels(
        self, sorting: Sorting, dispatchers: Sequence[Dispatcher], items: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """On one sheet per expert, see :mod:`~mmdet_moe.moe.experts.sheets`.

        Not for experts that cannot compute one, and batch norm in training.
        """
        if (
            any(x.dim() != 4 for x in items)
            or any(isinstance(m, _BatchNorm) and m.training for m in self.modules())
            or (is_distributed() and is_sharded(self))
            or not sorting.bounds[-1]
        ):
            return None
        kind, *others = map(sheets.signature, self)
        if kind not in self._margins:
            self._margins[kind] = sheets.margin_of(self[0], items[0].shape[1])
        margin = self._margins[kind]
        if margin is None or any(other != kind for other in others):
            return None
        return sheets.Sheets(sorting, dispatchers, items, margin).through(self)

    def entered(self, dispatcher: Dispatcher) -> set[int]:
        """All where ``fully_shard`` cut one: ranks then wait for each other in each of them."""
        if is_distributed() and is_sharded(self):
            return set(range(len(self)))
        return dispatcher.used_experts()

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        return receptive_field(self[0], in_channels)

    def share_weights(self) -> None:
        for expert in self[1:]:
            expert.load_state_dict(self[0].state_dict())

    def parameters_of(self, expert: int) -> list[nn.Parameter]:
        return list(self[expert].parameters())

    def entries(self, expert: int = 0) -> dict[str, Tensor]:
        return dict(self[expert].state_dict())

    def count(self, state_dict: dict[str, Tensor], prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r'(\d+)\.')
        return len({int(m.group(1)) for m in map(pattern.match, state_dict) if m})

    def store(
        self, state_dict: dict[str, Tensor], prefix: str, name: str, copies: list[Tensor]
    ) -> None:
        for e, value in enumerate(copies):
            state_dict[f'{prefix}{e}.{name}'] = value


def _rest_on_a_single_value(norm: _BatchNorm, args: tuple) -> None:
    # A variance of one value would be 0, and PyTorch refuses it.
    x = args[0]
    rests = norm.training and norm.track_running_stats and x.numel() == x.shape[1]
    norm.rests = rests  # type: ignore[assignment]  # as above
    if rests:
        norm.eval()


def _go_on(norm: nn.Module, args: tuple, output: Tensor) -> None:
    if norm.rests:
        norm.train()


def independent_copies(module: nn.Module, num: int) -> list[nn.Module]:
    """The module itself and ``num - 1`` copies whose weights are drawn anew.

    Layers with a ``reset_parameters`` method (all of PyTorch's own) get fresh values, so experts
    differ from the start; further initialisation is the business of MMEngine's ``init_weights``.
    """
    copies = [module] + [copy.deepcopy(module) for _ in range(num - 1)]
    for clone in copies[1:]:
        for layer in clone.modules():
            reset = getattr(layer, 'reset_parameters', None)
            if callable(reset):
                reset()
    return copies
