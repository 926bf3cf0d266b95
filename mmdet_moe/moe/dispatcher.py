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


class Dispatcher:
    """The routes of T items, sorted by expert.

    A weight of exactly 0 is no choice: such a route belongs to no expert, takes no row and gets no
    gradient.

    Args:
        expert_ids: int64 (T, K).
        weights: (T, K).
        num_experts: E.

    Attributes:
        offsets: int64 (E + 1,): expert e owns the rows ``offsets[e]`` to ``offsets[e + 1]``.
    """

    def __init__(self, expert_ids: Tensor, weights: Tensor, num_experts: int) -> None:
        self.expert_ids = expert_ids
        self.weights = weights
        self.num_experts = num_experts
        chosen = expert_ids.masked_fill(weights == 0, -1)
        self.offsets, self._inverse = ops.sort_routes(chosen, num_experts)

    @classmethod
    def to_one(cls, expert_ids: Tensor, weights: Tensor) -> 'Dispatcher':
        """All T items to the only expert, each with weight 1: nothing has to be moved.

        Args:
            expert_ids: (T, 1) of zeros.
            weights: (T, 1) of ones.
        """
        whole = cls.__new__(cls)
        whole.expert_ids, whole.weights, whole.num_experts = expert_ids, weights, 1
        whole.offsets = torch.tensor([0, len(expert_ids)], device=expert_ids.device)
        whole.bounds = [0, len(expert_ids)]
        whole._inverse = None
        return whole

    @property
    def is_whole(self) -> bool:
        """Whether all items go to one expert as they are."""
        return self._inverse is None

    def used_experts(self) -> set[int]:
        """The experts that get items."""
        return {e for e, (start, stop) in enumerate(pairwise(self.bounds)) if stop > start}

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[1]

    @cached_property
    def bounds(self) -> list[int]:
        """``offsets`` on the host, which waits for the device."""
        return self.offsets.tolist()

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

    def through(self, x_T: Tensor, experts: Sequence[Callable[[Tensor], Any]]) -> Any:
        """There and back, each expert on its own rows, if it has any: (T, ...) to (T, ...).

        Experts may return a structure that holds one tensor; the structure of the first is returned
        with the sum in the tensor's place.
        """
        rows_R = self.dispatch(x_T)
        parts = zip(experts, self.split(rows_R), strict=True)
        results = [expert(rows) for expert, rows in parts if len(rows)]
        if not results:  # nothing to do; one expert still says the output's shape
            results = [experts[0](rows_R)]
        tensors, rebuilds = zip(*map(unpack, results), strict=True)
        return rebuilds[0](self.combine(tensors[0] if len(tensors) == 1 else torch.cat(tensors)))

    def combine(self, y_R: Tensor) -> Tensor:
        """Sum each item's rows with their weights: (R, ...) to (T, ...)."""
        return y_R if self.is_whole else ops.combine(y_R, self.weights, self._inverse)


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
