"""Balancing inside the router: hard constraints, and the bias that needs no auxiliary loss.

A constraint changes which experts *can be chosen*, never the weights of the chosen ones. Its state
is kept in buffers, so that a resumed run decides exactly as the uninterrupted one, and it is fed
with sums over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mmdet_moe.checks import check_number
from mmdet_moe.moe.distributed import global_sum
from mmdet_moe.moe.pass_states import PassStates
from mmdet_moe.moe.precision import KeepsPrecision
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS

_TINY = torch.finfo(torch.float32).tiny


class Constraint(KeepsPrecision, ABC):
    """Base class. Subclasses say what :meth:`select` does and what :meth:`update` remembers.

    The state changes with every training forward pass. An activation checkpoint computes a part of
    the pass again, when it has changed: :meth:`remembered` gives what the pass itself went by.

    Args:
        num_experts: E; filled in by the router.
    """

    #: Whether the router must not add noise to its logits in training.
    excludes_noise = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._states = PassStates(type(self).__name__)

    def remembered(self, state: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """What a decision in training goes by: :meth:`.PassStates.remembered`."""
        return self._states.remembered(state, logits)

    @abstractmethod
    def select(self, logits: Tensor, training: bool) -> Tensor:
        """Values (T, E) by which the router chooses its top k; −inf forbids an expert."""

    @abstractmethod
    def update(self, routing: Routing) -> None:
        """Take one training batch into account. Called after the batch has been routed."""

    def renormalise(self) -> None:
        """Experts have been removed: make the state what it is if the others are all there are."""

    def by_expert(self) -> dict[str, Tensor]:
        """What a look at the training shows of it: names, and a number (E,) for each expert."""
        return {}


class _HardConstraint(Constraint):
    """Masks overused experts, in training only."""

    excludes_noise = True

    def __init__(self, num_experts: int, threshold: float) -> None:
        super().__init__(num_experts)
        # A negative one could mask every expert.
        check_number(type(self).__name__, 'threshold', threshold, least=0)
        self.threshold = threshold

    @abstractmethod
    def excess(self) -> Tensor:
        """(E,): how far each expert is above the limit from which on it is masked."""

    def masked(self) -> Tensor:
        """bool (E,): the experts that the next training batch cannot choose."""
        excess = self.excess()
        # On paper the least used expert is always below the limit; rounding must not break that.
        return (excess > 0).index_fill(0, excess.argmin(), False)

    def select(self, logits: Tensor, training: bool) -> Tensor:
        if not training:
            return logits
        return logits.masked_fill(self.remembered(self.masked, logits), float('-inf'))

    def by_expert(self) -> dict[str, Tensor]:
        return {'masked': self.masked()}

    def extra_repr(self) -> str:
        return f'threshold={self.threshold}'


@MODELS.register_module()
class RelativeImportanceConstraint(_HardConstraint):
    """Masks experts with more than their share of importance, summed up over training.

    After every training batch ``r_i += (I_i − Ī) / Ī`` with the mean importance ``Ī`` (= T / E);
    experts with ``r_i > threshold`` are masked in the next one (arXiv 2204.10598, "relative
    importance"). The r_i sum to 0, so one expert is always free.

    Args:
        num_experts: E; filled in by the router.
        threshold: m. The paper: 0.5 for classification, 0.3 for detection.
    """

    relative_importance: Tensor

    def __init__(self, num_experts: int, threshold: float = 0.5) -> None:
        super().__init__(num_experts, threshold)
        self.register_buffer('relative_importance', torch.zeros(num_experts))

    def excess(self) -> Tensor:
        return self.relative_importance - self.threshold

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        importance = global_sum(routing.importance(balancing=True).float())
        # The mean equals T / E when the weights of an item sum to 1; with Switch weights, which sum
        # to less, it keeps the r_i balanced around 0. A batch that counts nothing changes nothing.
        mean = importance.mean().clamp(min=_TINY)
        self.relative_importance += (importance - importance.mean()) / mean

    @torch.no_grad()
    def renormalise(self) -> None:
        self.relative_importance -= self.relative_importance.mean()


@MODELS.register_module()
class MeanImportanceConstraint(_HardConstraint):
    """Masks experts whose mean share of importance over training is too large.

    The running mean over training batches of ``I_i / T``; experts with more than
    ``1 / E + threshold`` are masked in the next batch (arXiv 2204.10598, "mean importance").

    Args:
        num_experts: E; filled in by the router.
        threshold: m, 0.3 in the paper.
    """

    mean_importance: Tensor
    num_batches: Tensor

    def __init__(self, num_experts: int, threshold: float = 0.3) -> None:
        super().__init__(num_experts, threshold)
        self.register_buffer('mean_importance', torch.zeros(num_experts))
        # No integer: averages of weights (MMEngine's EMA) leave these at the first iteration's.
        self.register_buffer('num_batches', torch.zeros(()))

    def excess(self) -> Tensor:
        return self.mean_importance - (1 / self.num_experts + self.threshold)

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        importance = global_sum(routing.importance(balancing=True).float())
        total = importance.sum()
        counts = (total > 0).float()  # a batch that counts nothing is no batch
        self.num_batches += counts
        share = importance / total.clamp(min=_TINY)
        step = counts / self.num_batches.clamp(min=1)
        self.mean_importance += step * (share - self.mean_importance)

    @torch.no_grad()
    def renormalise(self) -> None:
        self.mean_importance /= self.mean_importance.sum().clamp(min=_TINY)


@MODELS.register_module()
class BiasBalancing(Constraint):
    """Auxiliary-loss-free balancing (arXiv 2408.15664): a bias per expert steers the choice alone.

    Experts are chosen by ``softmax(logits) + b``; the weights come from the logits without b. After
    every training batch ``b_i += update_rate · sign(mean load − load_i)``. Unlike a hard constraint
    the bias is part of the trained router and acts at inference as well.

    Args:
        num_experts: E; filled in by the router.
        update_rate: u, 0.001 in the paper.
    """

    bias: Tensor

    def __init__(self, num_experts: int, update_rate: float = 0.001) -> None:
        super().__init__(num_experts)
        check_number('BiasBalancing', 'update_rate', update_rate, above=0)
        self.update_rate = update_rate
        self.register_buffer('bias', torch.zeros(num_experts))

    def select(self, logits: Tensor, training: bool) -> Tensor:
        bias = self.remembered(self.bias.clone, logits) if training else self.bias
        values = logits.softmax(dim=-1) + bias.to(logits.dtype)
        # No bias brings back an expert that is not there.
        return values.masked_fill(torch.isneginf(logits), float('-inf'))

    def by_expert(self) -> dict[str, Tensor]:
        return {'bias': self.bias}

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        load = global_sum(routing.choices(balancing=True).float())
        self.bias += self.update_rate * torch.sign(load.mean() - load)

    def extra_repr(self) -> str:
        return f'update_rate={self.update_rate}'
