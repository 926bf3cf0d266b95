"""The decision of one forward pass.

Letters used in tensor names here and everywhere else: T routed items, E experts, K (``k``) chosen
experts per item, M = T·K routes, R ≤ M of them that are evaluated (rows), N images, L pyramid
levels, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

#: The fields of a :class:`Routing` with one row for each item.
_TENSORS = ('expert_ids', 'weights', 'logits', 'decision_weights', 'dropped', 'gates')


@dataclass
class Routing:
    """Which experts were chosen for which item, and with what weight.

    Items are ordered by level, then by image, then by patch, pixel or token (row by row).

    Attributes:
        expert_ids: int64 (T, K), the chosen experts, best first.
        weights: (T, K), non-negative. An entry that is exactly 0 is no choice: its expert is not
            evaluated and it counts in neither importance nor load (a hard constraint can leave
            fewer free experts than K).
        logits: (T, E), the router's output without training noise and without masks.
        items_per_level: How many of the T items each level has; their sum is T.
        num_images: Number of images N, of which every level has all, each with the same number of
            items. Tokens (N, ..., C) count the first dimension as images, so (T, C) has T images
            of one token each, as RoI features (T, C, h, w) have.
        decision_weights: (T,) what each decision counts in the balancing; None until the owner of
            the layer has said so (see :meth:`mmdet_moe.moe.MoELayer.weigh_decisions`).
        dropped: bool (T, K), the routes that exceed the capacity of their expert and give 0; None
            without a capacity. Importance and load count them: balancing has to see the overload.
        gates: (T, K), of either sign, what the experts' outputs are multiplied with where that is
            not the weights (:meth:`mmdet_moe.moe.Router.gates`); 0 where the weight is. Importance,
            load and everything else that asks who was chosen goes by the weights.
        sources: The number of the data set that each of the N images comes from; None until
            somebody has said so, which :class:`~mmdet_moe.moe.DatasetLoss` needs.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor
    items_per_level: tuple[int, ...]
    num_images: int
    decision_weights: Tensor | None = None
    dropped: Tensor | None = None
    gates: Tensor | None = None
    sources: tuple[int, ...] | None = None

    @classmethod
    def cat(cls, calls: Sequence['Routing']) -> 'Routing':
        """The decisions of several calls as one, the levels of each call after those before it.

        Of calls with different numbers of images, whose decision is whose cannot be told from the
        result: ``num_images`` is -1.
        """
        if len(calls) == 1:
            return calls[0]

        def joined(name: str) -> Tensor | None:
            parts = [getattr(call, name) for call in calls]
            return None if any(part is None for part in parts) else torch.cat(parts)

        tensors: dict[str, Any] = {name: joined(name) for name in _TENSORS}
        images = {call.num_images for call in calls}
        return cls(
            **tensors,
            items_per_level=sum((call.items_per_level for call in calls), ()),
            num_images=images.pop() if len(images) == 1 else -1,
        )

    @property
    def is_plain(self) -> bool:
        """Whether every route counts with its weight and none is dropped."""
        return self.gates is None and self.dropped is None

    @property
    def num_items(self) -> int:
        """T."""
        return self.expert_ids.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[1]

    @property
    def factors(self) -> Tensor:
        """(T, K): what the experts' outputs are multiplied with, the gates or the weights."""
        return self.weights if self.gates is None else self.gates

    @cached_property
    def kept_factors(self) -> Tensor:
        """:attr:`factors`, 0 where a route is dropped."""
        return self.factors if self.dropped is None else self.factors.masked_fill(self.dropped, 0)

    @cached_property
    def level_ids(self) -> Tensor:
        """int64 (T,): the index of each item's map in the list that the router was given."""
        return spread(
            tuple(range(len(self.items_per_level))), self.items_per_level, self.expert_ids.device
        )

    @cached_property
    def image_ids(self) -> Tensor:
        """int64 (T,): the index of each item's image in the batch."""
        if self.num_images < 0:
            raise RuntimeError('The calls of this routing held different numbers of images')
        items_per_image = [items // max(self.num_images, 1) for items in self.items_per_level]
        return spread(
            tuple(range(self.num_images)) * len(items_per_image),
            tuple(items for items in items_per_image for _ in range(self.num_images)),
            self.expert_ids.device,
        )

    def dense_weights(self) -> Tensor:
        """(T, E): the weights with an exact 0 for every expert that was not chosen."""
        return self.weights.new_zeros(self.logits.shape).scatter(1, self.expert_ids, self.weights)

    def importance(self, balancing: bool = False) -> Tensor:
        """Importance ``I_i = sum_x w_i(x)`` of each expert, (E,), differentiable.

        Args:
            balancing: Count each decision with its ``decision_weights``, as the losses and
                constraints do, instead of as 1.
        """
        return self._sum_per_expert(self.weights, balancing)

    def load(self, balancing: bool = False) -> Tensor:
        """Number of items that each expert got, (E,), without gradient.

        Args:
            balancing: As in :meth:`importance`.
        """
        return self._sum_per_expert((self.weights > 0).to(self.weights.dtype), balancing)

    def choices(self, balancing: bool = False) -> Tensor:
        """:meth:`load` that also counts choices whose weight is too small for its dtype, (E,).

        So a bias can choose an expert with a logit that lies 104 and more below the best. An expert
        whose logit is −inf is no choice.

        Args:
            balancing: As in :meth:`importance`.
        """
        chosen = ~self.logits.gather(1, self.expert_ids).isneginf()
        return self._sum_per_expert(chosen.to(self.weights.dtype), balancing)

    def num_dropped(self) -> Tensor:
        """How many routes exceed the capacity of their expert, a scalar."""
        return self.weights.new_zeros(()) if self.dropped is None else self.dropped.sum()

    def level(self, index: int) -> tuple[Tensor, Tensor]:
        """``expert_ids`` of one level's items, and their factors, 0 where a route is dropped."""
        if len(self.items_per_level) == 1:
            return self.expert_ids, self.kept_factors
        start = sum(self.items_per_level[:index])
        items = slice(start, start + self.items_per_level[index])
        return self.expert_ids[items], self.kept_factors[items]

    def of_level(self, index: int) -> 'Routing':
        """The decisions of one level alone."""
        start = sum(self.items_per_level[:index])
        items = slice(start, start + self.items_per_level[index])
        parts = {name: getattr(self, name) for name in _TENSORS}
        own: dict[str, Any] = {n: None if p is None else p[items] for n, p in parts.items()}
        return replace(
            self,
            **own,
            items_per_level=(self.items_per_level[index],),
        )

    def known_decision_weights(self) -> Tensor:
        """``decision_weights``, or an error that says who should have given them."""
        if self.decision_weights is None:
            raise RuntimeError(
                'The decisions of this routing have not been weighed yet: the owner of the MoE '
                'layer calls MoELayer.weigh_decisions() before balancing is computed.'
            )
        return self.decision_weights

    def _sum_per_expert(self, values_TK: Tensor, balancing: bool) -> Tensor:
        if balancing:
            values_TK = values_TK * self.known_decision_weights()[:, None]
        # One item after the other: in float32 a sum of millions would stand still.
        total = values_TK.new_zeros(self.num_experts, dtype=torch.float64)
        total = total.index_add(0, self.expert_ids.flatten(), values_TK.flatten().double())
        return total.to(values_TK.dtype)


@lru_cache(maxsize=64)  # a model repeats its few shapes, and a copy from the host waits for a GPU
@torch.inference_mode(False)  # a later training may need it in its graph
def spread(values: tuple[int, ...], repeats: tuple[int, ...], device: torch.device) -> Tensor:
    """Each value as often as it is to be repeated, (sum of ``repeats``,); not to be changed."""
    once, times = (torch.tensor(of, dtype=torch.int64) for of in (values, repeats))
    return once.repeat_interleave(times, output_size=sum(repeats)).to(device)
