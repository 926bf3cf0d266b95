"""What a pass in training went by, for activation checkpoints, which compute a part of it again."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError


def in_backward() -> bool:
    """Whether a backward pass runs, in which an activation checkpoint computes something again."""
    if torch.compiler.is_compiling():  # which does so by itself, and not in Python
        return False
    return torch._C._current_graph_task_id() != -1


class _Graph:
    """Lives in a graph for as long as that can be asked for a gradient."""


class _Call:
    """What one call in training went by, and whether a backward pass may ask for it again."""

    def __init__(self, state: Tensor, x: Tensor) -> None:
        self.state = state
        self.is_done = False
        self.graph: weakref.ref[_Graph] | None = None
        # There is none to be seen where a reentrant checkpoint runs, or where nothing is trained.
        node: Any = x.grad_fn
        if node is not None:
            self.graph = weakref.ref(node.metadata.setdefault(__name__, _Graph()))

    @property
    def is_awaited(self) -> bool:
        return not self.is_done and (self.graph is None or self.graph() is not None)


class PassStates:
    """The states that calls in training went by, where the state changes with every such pass.

    Args:
        owner: Whose state it is, for errors.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        # In their order. The bound is for passes of which no graph says when they are over.
        self._calls: deque[_Call] = deque(maxlen=64)

    def remembered(self, state: Callable[[], Tensor], x: Tensor) -> Tensor:
        """What a call in training goes by: ``state()``, or what that was in the forward pass.

        Args:
            state: Computes it; the result must not change afterwards.
            x: What the call is about, such as the logits that are decided on; a node of the graph.

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
            self._calls.extend([*waiting, _Call(state(), x)])
            return self._calls[-1].state
        calls = [call for call in self._calls if call.is_awaited] or list(self._calls)[-1:]
        if not calls:
            return state()
        if any(not torch.equal(call.state, calls[0].state) for call in calls[1:]):
            raise ConfigError(
                f'{self.owner}: an activation checkpoint (with_cp=True) computes one of several '
                'forward passes again, between which its state has changed; call backward() after '
                'each of them, enclose them by begin() and end() of the MoE layer, or leave out '
                'the checkpoint'
            )
        # One of them is over, whichever: all went by the same. Several with graphs end with these.
        if calls[0].graph is None or len(calls) == 1:
            calls[0].is_done = not torch._C._autograd._get_current_graph_task_keep_graph()
        return calls[0].state

    def __getstate__(self) -> dict[str, Any]:
        # What graphs are waited for is no part of a copy.
        return {'owner': self.owner, '_calls': deque(maxlen=self._calls.maxlen)}
