"""The way of one map's items to their experts and back."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_moe import ops
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.precision import CastBefore, autocast, autocast_dtype
from mmdet_moe.moe.routing import spread


class Sorting:
    """The routes of all levels of a forward pass, sorted together once somebody needs them sorted.

    A weight of exactly 0 is no choice: such a route belongs to no expert, takes no row and gets no
    gradient.

    Args:
        expert_ids: int64 (T, K), of the items of all levels.
        weights: (T, K).
        num_experts: E.
        items_per_level: How many of the T items each of the L levels has. Default: all on one.
        level_ids: int64 (T,), the level of each item; needed if there are several.
    """

    def __init__(
        self,
        expert_ids: Tensor,
        weights: Tensor,
        num_experts: int,
        items_per_level: Sequence[int] = (),
        level_ids: Tensor | None = None,
    ) -> None:
        self.num_experts = num_experts
        self._num_levels = max(len(items_per_level), 1)
        self._ids, self._weights, self._level_ids = expert_ids, weights, level_ids
        #: What else to read when the bounds are read, as reading anything waits for the device: a
        #: scalar on the device, and who is told its value.
        self.watched: tuple[Tensor, Callable[[bool], None]] | None = None

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """What :func:`mmdet_moe.ops.sort_routes` gives for the keys ``level · E + expert``."""
        keys = self._ids
        if self._num_levels > 1:
            assert self._level_ids is not None
            keys = keys + self.num_experts * self._level_ids[:, None]
        keys = keys.masked_fill(self._weights == 0, -1)
        return ops.sort_routes(keys, self.num_experts * self._num_levels)

    @cached_property
    def bounds(self) -> list[int]:
        """The offsets on the host; the only thing here that waits for the device."""
        offsets = self.tables[0]
        if self.watched is None:
            return offsets.tolist()
        flag, tell = self.watched
        *bounds, value = torch.cat([offsets, flag.view(1).to(offsets.dtype)]).tolist()
        self.watched = None
        tell(bool(value))
        return bounds


class Dispatcher:
    """The routes of the T items of one map, sorted by expert where the experts need it.

    Args:
        expert_ids: int64 (T, K).
        weights: (T, K).
        num_experts: E.
        sorting: That of all levels, if this map is one of several.
        level: Which one.
        first_item: Number of its first item among those of all levels.
    """

    def __init__(
        self,
        expert_ids: Tensor,
        weights: Tensor,
        num_experts: int,
        sorting: Sorting | None = None,
        level: int = 0,
        first_item: int = 0,
    ) -> None:
        self.expert_ids = expert_ids
        self.weights = weights
        self.num_experts = num_experts
        self.is_whole = False
        #: What is made of the parameters for all maps of a forward pass, if there are several.
        self.shared: dict[tuple[str, Tensor], Any] | None = None
        self._sorting = sorting or Sorting(expert_ids, weights, num_experts)
        self._level, self._first_item = level, first_item

    @classmethod
    def to_one(
        cls, expert_ids: Tensor, weights: Tensor, expert: int = 0, num_experts: int = 1
    ) -> 'Dispatcher':
        """All T items to one expert, each with weight 1: nothing has to be moved or sorted.

        Args:
            expert_ids: (T, 1), all of them ``expert``.
            weights: (T, 1) of ones.
            expert: Which one.
            num_experts: E.
        """
        whole = cls(expert_ids, weights, num_experts)
        whole.is_whole = True
        whole.bounds = [0] * (expert + 1) + [len(expert_ids)] * (num_experts - expert)
        whole.offsets = spread(tuple(whole.bounds), (1,) * (num_experts + 1), expert_ids.device)
        return whole

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[1]

    @cached_property
    def offsets(self) -> Tensor:
        """int64 (E + 1,): expert e owns the rows ``offsets[e]`` to ``offsets[e + 1]``."""
        offsets = self._sorting.tables[0]
        if offsets.shape[0] == self.num_experts + 1:
            return offsets
        start = self._level * self.num_experts
        own = offsets[start : start + self.num_experts + 1]
        return own - own[:1]

    @cached_property
    def bounds(self) -> list[int]:
        """:attr:`offsets` on the host, which waits for the device once for all levels."""
        start = self._level * self.num_experts
        own = self._sorting.bounds[start : start + self.num_experts + 1]
        return [bound - own[0] for bound in own]

    @cached_property
    def _first_row(self) -> int:
        return self._sorting.bounds[self._level * self.num_experts]

    @cached_property
    def _inverse(self) -> Tensor:
        inverse = self._sorting.tables[1]
        if len(inverse) == len(self.expert_ids):
            return inverse
        own = inverse[self._first_item : self._first_item + len(self.expert_ids)]
        # Routes of nobody come last of all, so they stay beyond the rows of this level.
        return own - self._first_row

    def used_experts(self) -> set[int]:
        """The experts that get items."""
        return {e for e, (start, stop) in enumerate(pairwise(self.bounds)) if stop > start}

    def parts(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """A parameter (E, ...) of each expert, the same tensors for all maps of a forward pass.

        So their gradients are put together once, and :meth:`cast` knows them again.
        """
        return self._once(('parts', stacked), stacked.unbind)

    def cast(self, x: Tensor) -> Tensor:
        """A parameter, or a part of one, as autocast casts it, once for all maps of a forward pass.

        Autocast itself remembers what it has cast of leaves alone, and no part is a leaf.
        """
        if self._kept is None or autocast_dtype(x) == x.dtype:
            return autocast(x)
        return CastBefore.apply(x, self._once(('cast', x), lambda: autocast(x.detach())))

    @property
    def _kept(self) -> dict[tuple[str, Tensor], Any] | None:
        # Graphs would be compiled again for each of its states.
        return None if torch.compiler.is_compiling() else self.shared

    def _once(self, key: tuple[str, Tensor], make: Callable[[], Any]) -> Any:
        kept = self._kept
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def dispatch(self, x_T: Tensor) -> Tensor:
        """Copy the items to rows in the order of the experts: (T, ...) to (R, ...)."""
        if self.is_whole:
            return x_T
        return ops.dispatch(x_T, self._inverse, self.bounds[-1])

    def split(self, rows_R: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows, views of E lengths from 0 on.

        All in one operation: a slice for each expert would make autograd fill and add a gradient of
        R rows for each.
        """
        return rows_R.split([stop - start for start, stop in pairwise(self.bounds)])

    def through(
        self,
        x_T: Tensor,
        experts: Sequence[Callable[[Tensor], Any]],
        entered: set[int] | None = None,
    ) -> Any:
        """There and back, each expert on its own rows, if it has any: (T, ...) to (T, ...).

        ``entered`` says which are evaluated, if not those that have rows.

        Experts may return a structure that holds one tensor; the structure of the first is returned
        with the sum in the tensor's place.
        """
        rows_R = self.dispatch(x_T)
        entered = self.used_experts() if entered is None else entered
        parts = enumerate(zip(experts, self.split(rows_R), strict=True))
        results = [expert(rows) for e, (expert, rows) in parts if e in entered]
        if not results:  # nothing to do; one expert still says the output's shape
            results = [experts[0](rows_R)]
        tensors, rebuilds = zip(*map(unpack, results), strict=True)
        return rebuilds[0](self.combine(tensors[0] if len(tensors) == 1 else torch.cat(tensors)))

    def combine(self, y_R: Tensor) -> Tensor:
        """Sum each item's rows with their weights: (R, ...) to (T, ...)."""
        return y_R if self.is_whole else ops.combine(y_R, self.weights, self._inverse)


class EveryExpert(Dispatcher):
    """Every item to every expert: dense evaluation, for graphs that are written down once.

    An export would write down how many items of its example each expert gets, and a compiled graph
    would end where the host has to know. Here no shape depends on any decision, and no expert is
    left out. What was not chosen adds exactly 0, even where an expert's output is not finite. The
    rows are those of expert 0, all T, then those of expert 1, and so on.

    Args:
        expert_ids: int64 (T, K).
        weights: (T, K).
        num_experts: E.
    """

    def __init__(self, expert_ids: Tensor, weights: Tensor, num_experts: int) -> None:
        super().__init__(expert_ids, weights, num_experts)
        experts = torch.arange(num_experts, device=expert_ids.device)
        # No sizes: a trace keeps those that Python sees.
        chosen = expert_ids[..., None] == experts
        #: (T, E), or with further dimensions that are broadcast against those of an output.
        self.factors = (chosen * weights[..., None]).sum(1)

    @property
    def bounds(self) -> list[int]:
        return [e * self.expert_ids.shape[0] for e in range(self.num_experts + 1)]

    @property
    def offsets(self) -> Tensor:
        experts = torch.arange(self.num_experts + 1, device=self.expert_ids.device)
        return experts * self.expert_ids.shape[0]

    def used_experts(self) -> set[int]:
        return set(range(self.num_experts))

    def dispatch(self, x_T: Tensor) -> Tensor:
        return torch.cat([x_T] * self.num_experts)

    def split(self, rows_R: Tensor) -> tuple[Tensor, ...]:
        return rows_R.unflatten(0, (self.num_experts, -1)).unbind()

    def through(
        self,
        x_T: Tensor,
        experts: Sequence[Callable[[Tensor], Any]],
        entered: set[int] | None = None,
    ) -> Any:
        # A copy for each, because an expert may change in place what the next one is given.
        results = [expert(x_T.clone()) for expert in experts]
        tensors, rebuilds = zip(*map(unpack, results), strict=True)
        return rebuilds[0](self.sum(tensors))

    def combine(self, y_R: Tensor) -> Tensor:
        return self.sum(self.split(y_R))

    def sum(self, outputs: Sequence[Tensor]) -> Tensor:
        """The mixture of what each expert made of all items, E times (T, ...)."""
        total: Tensor | None = None
        for y, factors in zip(outputs, self.factors.unbind(1), strict=True):
            if factors.dim() > 2:  # those of the pixels of a map
                check_size(y, factors.shape[2:])
            like_y = (..., *[None] * (y.dim() - factors.dim()))
            part = weighted(y, factors[like_y])
            total = part if total is None else total + part
        assert total is not None
        return total.to(outputs[0].dtype)


def weighted(y: Tensor, factors: Tensor) -> Tensor:
    """``factors * y`` in at least float32, to be summed up; 0 times what is not finite is 0."""
    wide = torch.promote_types(y.dtype, torch.float32)
    factors = factors.to(wide)
    return torch.where(factors == 0, 0, factors * y.to(wide))


def check_size(y: Tensor, size: Sequence[int], whose: str = '') -> None:
    """Refuse what an expert made of a whole map of another size.

    Raises:
        ConfigError: If the size of ``y`` (N, C, H, W) is not ``size``.
    """
    if y.shape[2:] != size:
        raise ConfigError(
            f'{whose}whole_maps=True needs experts that keep the size of the map, but an expert '
            f'made {tuple(y.shape[2:])} of {tuple(size)}'
        )


def unpack(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The one tensor in what a module returned, and how to put another one in its place.

    Raises:
        ConfigError: If there is none, or more than one.
    """
    if isinstance(output, Tensor):
        return output, lambda y: y
    leaves, spec = tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(places) != 1:
        raise ConfigError(
            f'an expert returned {len(places)} tensors ({type(output).__name__}), of which one '
            'decision can mix only one; choose a path inside of it'
        )

    def rebuild(y: Tensor) -> Any:
        return tree_unflatten([*leaves[: places[0]], y, *leaves[places[0] + 1 :]], spec)

    return leaves[places[0]], rebuild
