"""The way of one map's items to their experts and back."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mmdet_moe import ops


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
        self._order, self.offsets, self._inverse = ops.sort_routes(chosen, num_experts)

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
        return ops.dispatch(x_T, self._order[: self.bounds[-1]], self.top_k)

    def split(self, rows_R: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows, views of E lengths from 0 on.

        All in one operation: a slice for each expert would make autograd fill and add a gradient of
        R rows for each.
        """
        return rows_R.split([stop - start for start, stop in pairwise(self.bounds)])

    def through(self, x_T: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """There and back, each expert on its own rows, if it has any: (T, ...) to (T, ...)."""
        rows_R = self.dispatch(x_T)
        parts = zip(experts, self.split(rows_R), strict=True)
        results = [expert(rows) for expert, rows in parts if len(rows)]
        if not results:  # nothing to do; one expert still says the output's shape
            results = [experts[0](rows_R)]
        return self.combine(results[0] if len(results) == 1 else torch.cat(results))

    def combine(self, y_R: Tensor) -> Tensor:
        """Sum each item's rows with their weights: (R, ...) to (T, ...)."""
        return ops.combine(y_R, self.weights, self._inverse)
