"""Balancing inside the router: hard constraints, and the bias that needs no auxiliary loss.

A constraint changes which experts *can be chosen*, never the weights of the chosen ones. Its state
is kept in buffers, so that a resumed run decides exactly as the uninterrupted one, and it is fed
with sums over all ranks.
"""

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.distributed import global_sum
from mmdet_moe.moe.precision import KeepsPrecision
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS

_TINY = torch.finfo(torch.float32).tiny


def in_backward() -> bool:
    """Whether a backward pass runs, in which an activation checkpoint computes something again."""
    if torch.compiler.is_compiling():  # which does so by itself, and not in Python
        return False
    return torch._C._current_graph_task_id() != -1


class _Graph:
    """Lives in a graph for as long as that can be asked for a gradient."""


class _Call:
    """What one decision in training went by, and whether a backward pass may ask for it again."""

    def __init__(self, state: Tensor, logits: Tensor) -> None:
        self.state = state
        self.is_done = False
        self.graph: weakref.ref[_Graph] | None = None
        # There is none to be seen where a reentrant checkpoint runs, or where nothing is trained.
        node: Any = logits.grad_fn
        if node is not None:
            self.graph = weakref.ref(node.metadata.setdefault(__name__, _Graph()))

    @property
    def is_awaited(self) -> bool:
        return not self.is_done and (self.graph is None or self.graph() is not None)


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
        # In their order. The bound is for passes of which no graph says when they are over.
        self._calls: deque[_Call] = deque(maxlen=64)

    def remembered(self, state: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """What a decision of a training goes by: ``state()``, or what that was in the forward pass.

        Args:
            state: Computes it; the result must not change afterwards.
            logits: (T, E), those that are decided on.

        Raises:
            ConfigError: In a backward pass through several forward passes that went by different
                states: to which of them an activation checkpoint belongs, nothing tells. A forward
                pass without gradients counts, as it may be that of a reentrant checkpoint.
        """
        if torch.compiler.is_compiling():
            return state()
        if not in_backward():
            waiting = [call for call in self._calls if call.is_awaited]
            self._calls.clear()
            self._calls.extend([*waiting, _Call(state(), logits)])
            return self._calls[-1].state
        calls = [call for call in self._calls if call.is_awaited] or list(self._calls)[-1:]
        if not calls:
            return state()
        if any(not torch.equal(call.state, calls[0].state) for call in calls[1:]):
            raise ConfigError(
                f'{type(self).__name__}: an activation checkpoint (with_cp=True) computes one of '
                'several forward passes again, between which the constraint has changed; call '
                'backward() after each of them, enclose them by begin() and end() of the MoE '
                'layer, or leave out the checkpoint'
            )
        # One of them is over, whichever: all went by the same. Several with graphs end with these.
        if calls[0].graph is None or len(calls) == 1:
            calls[0].is_done = not torch._C._autograd._get_current_graph_task_keep_graph()
        return calls[0].state

    def __getstate__(self) -> dict[str, Any]:
        # What graphs are waited for is no part of a copy.
        return {**self.__dict__, '_calls': deque(maxlen=self._calls.maxlen)}

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
        if threshold < 0:
            raise ConfigError(
                f'{type(self).__name__}: threshold={threshold} could mask every expert; '
                'use a value of at least 0'
            )
        self.threshold = threshold

    @abstractmethod
    def usage(self) -> Tensor:
        """(E,): what is compared with :meth:`limit`."""

    @abstractmethod
    def limit(self) -> float:
        """Experts whose usage is above it are masked."""

    def masked(self) -> Tensor:
        """bool (E,): the experts that the next training batch cannot choose."""
        usage = self.usage()
        mask = usage > self.limit()
        # On paper the least used expert is always below the limit; rounding must not break that.
        return mask.index_fill(0, usage.argmin(), False)

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

    def usage(self) -> Tensor:
        return self.relative_importance

    def limit(self) -> float:
        return self.threshold

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

    def usage(self) -> Tensor:
        return self.mean_importance

    def limit(self) -> float:
        return 1 / self.num_experts + self.threshold

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
        if update_rate <= 0:
            raise ConfigError(
                f'BiasBalancing: update_rate={update_rate} never balances; use a positive value'
            )
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
