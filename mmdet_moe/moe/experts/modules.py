"""Experts that are modules of any kind, each with its own weights."""

import copy
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher, Sorting, unpack
from mmdet_moe.moe.distributed import is_distributed, is_sharded
from mmdet_moe.moe.experts import sheets
from mmdet_moe.moe.experts.base import Experts
from mmdet_moe.moe.receptive_field import receptive_field

#: How experts that are modules compute several levels.
IMPLS = ('auto', 'levels', 'sheets')


class ModuleExperts(ModuleList, Experts):
    """A list of E modules of the same kind. Each computes its items as one sub-batch; one without
    items is not evaluated.

    Batch norms take their statistics from the items of their expert. Where that is one value per
    channel, a single item on a 1×1 map, they use the running statistics, as at inference.

    Args:
        modules: The experts, which map (T, ...) to (T, ...).
    """

    #: Which dimension of what the modules take and give holds the items, 0 or 1.
    batch_dim = 0

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
        if not (args or kwargs or self.batch_dim):
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
        for e, expert in enumerate(experts):
            more, named = tree_unflatten([self._laid_out(part[e]) for part in parts], spec)
            calls.append(partial(self._call, expert, more, named))
        return dispatcher.through(x_T, calls, entered)

    def _call(self, expert: nn.Module, args: list, kwargs: dict, x_R: Tensor) -> Any:
        output = expert(self._laid_out(x_R), *args, **kwargs)
        if not self.batch_dim:
            return output
        y, rebuild = unpack(output)
        if y.dim() < 3 or y.shape[1] != len(x_R):
            raise ConfigError(
                f'batch_dim=1 needs experts that make (T, N, ...) of (T, N, C), but an expert made '
                f'{tuple(y.shape)} of N = {len(x_R)} items; choose a path that keeps N in its place'
            )
        return rebuild(y.transpose(0, 1))

    def _laid_out(self, rows_R: Any) -> Any:
        # A copy, because a module may view its input as its model let it.
        swap = self.batch_dim and isinstance(rows_R, Tensor)
        return rows_R.transpose(0, 1).contiguous() if swap else rows_R

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
        kinds = tuple(map(sheets.signature, self))
        if kinds not in self._margins:
            found = (sheets.margin_of(expert, items[0].shape[1]) for expert in self)
            margins = [margin for margin in found if margin is not None]
            self._margins[kinds] = max(margins) if len(margins) == len(self) else None
        if (margin := self._margins[kinds]) is None:
            return None
        return sheets.Sheets(sorting, dispatchers, items, margin).through(self)

    def entered(self, dispatcher: Dispatcher) -> set[int]:
        """All where ``fully_shard`` cut one: ranks then wait for each other in each of them."""
        if is_distributed() and is_sharded(self):
            return set(range(len(self)))
        return dispatcher.used_experts()

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        """As :meth:`Experts.receptive_field`; the largest radius, of experts of one stride.

        Raises:
            ConfigError: If they cannot be told, or the strides differ.
        """
        fields = [receptive_field(expert, in_channels) for expert in self.unlike()]
        radii, strides = zip(*fields, strict=True)
        if len(set(strides)) > 1:
            raise ConfigError(
                f'the experts have the strides {sorted(set(strides))}, so that their outputs do '
                'not fit onto each other; use experts of one stride'
            )
        return max(radii), strides[0]

    def unlike(self) -> list[nn.Module]:
        """One expert of each structure: those left out differ in their weights alone."""
        distinct: dict[tuple, nn.Module] = {}
        for expert in self:
            distinct.setdefault(structure_of(expert), expert)
        return list(distinct.values())

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


def structure_of(module: nn.Module) -> tuple:
    """All that a module is but for its parameters and running statistics.

    What has no telling text, as an object with its address, differs even if it is alike.
    """
    structure = []
    for name, part in module.named_modules():
        values = {n: v for n, v in vars(part).items() if n not in _INTERNAL}
        if not hasattr(part, 'reset_running_stats'):
            values |= part._buffers
        settings = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in values.items()}
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        shapes = [(n, tuple(p.shape)) for n, p in part.named_parameters(recurse=False)]
        structure.append((name, type(part), repr((settings, hooks, shapes))))
    return tuple(structure)


#: Of every module.
_INTERNAL = vars(nn.Module()).keys()


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
