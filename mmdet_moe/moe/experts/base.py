"""What an MoE layer needs of its experts, of whatever kind they are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, initialize
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher, Sorting


class Experts(nn.Module, ABC):
    """E experts of one kind, evaluated together.

    A subclass decides where the weights live and how items meet their experts; routers, balancing,
    granularity and analysis do not depend on it.
    """

    #: Where in the dense module the entries lie, with a dot: ``'conv.'`` in a ``ConvModule``.
    dense_scope: str = ''

    #: Whether an item of any shape is one vector to them, instead of a feature map.
    take_vectors: bool = False

    #: Whether each expert has parameters of its own, which get no gradient without items.
    separate_parameters: bool = True

    #: Over how many ranks they are spread; this one holds E / parts of them.
    parts: int = 1

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E."""

    @abstractmethod
    def forward(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        """``y_t = sum_j w_tj E_{id_tj}(x_t)``.

        Args:
            x_T: Items, (T, ...).
            dispatcher: Which experts each item goes to, and with what weights.

        Returns:
            (T, ...).
        """

    def joins_levels(self, maps: Sequence[Tensor]) -> bool:
        """Whether to try :meth:`join_levels` for the levels of a pyramid."""
        return False

    def join_levels(
        self, sorting: Sorting, dispatchers: Sequence[Dispatcher], items: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """As :meth:`forward` of all levels of a pyramid at once, where experts of this kind can.

        Args:
            sorting: The routes of all levels.
            dispatchers: Of each level.
            items: Of each level, (T_l, ...).

        Returns:
            Of each level, (T_l, ...); None to be called for each level by itself.
        """
        return None

    def entered(self, dispatcher: Dispatcher) -> set[int]:
        """The experts that are evaluated: those with items."""
        return dispatcher.used_experts()

    @abstractmethod
    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        """Radius of an expert's receptive field in input pixels, the largest, and total stride.

        Args:
            in_channels: C of the maps that the experts take.

        Raises:
            ConfigError: If they cannot be told.
        """

    @abstractmethod
    def share_weights(self) -> None:
        """Make all experts copies of the first one."""

    def parameters_of(self, expert: int) -> list[nn.Parameter]:
        """The parameters that are missing in the graph when this expert gets no items."""
        return []

    @abstractmethod
    def entries(self, expert: int = 0) -> dict[str, Tensor]:
        """One expert's parameters and buffers by the names that they have in a dense module."""

    @abstractmethod
    def count(self, state_dict: dict[str, Tensor], prefix: str) -> int:
        """How many experts a checkpoint has under ``prefix``; 0 if it has none.

        Entries of the same experts in another form are converted on the way, in place.
        """

    @abstractmethod
    def store(
        self, state_dict: dict[str, Tensor], prefix: str, name: str, copies: list[Tensor]
    ) -> None:
        """Put one entry of every expert into a checkpoint, in place."""


class StackedExperts(Experts, BaseModule):
    """Experts whose weights lie in common parameters, stacked along a first axis of length E."""

    separate_parameters = False
    _is_init: bool  # of MMEngine's

    @property
    def num_experts(self) -> int:
        return next(self.parameters()).shape[0]

    def dense(self) -> nn.Module:
        """One expert as a module of its own, with fresh weights; needed for an ``init_cfg``.

        Raises:
            ConfigError: If the kind of experts does not define it.
        """
        raise ConfigError(
            f'expert.init_cfg: {type(self).__name__} do not say what one expert is, so it '
            'cannot be initialised; remove init_cfg, or define their dense()'
        )

    def init_weights(self) -> None:
        """Initialise every expert by itself, as ``init_cfg`` says of its dense layers."""
        if self.init_cfg and not self._is_init:
            for e in range(self.num_experts):
                dense = self.dense()
                initialize(nn.Sequential(dense), self.init_cfg)
                self.set_expert(e, dense)
            self._is_init = True

    @torch.no_grad()
    def set_expert(self, e: int, dense: nn.Module) -> None:
        """Give expert e the weights of a dense module."""
        for name, parameter in dense.named_parameters():
            self.get_parameter(name)[e] = parameter

    @torch.no_grad()
    def share_weights(self) -> None:
        for parameter in self.parameters():
            parameter[1:] = parameter[0].clone()

    def entries(self, expert: int = 0) -> dict[str, Tensor]:
        return {name: value[expert] for name, value in self.state_dict().items()}

    def count(self, state_dict: dict[str, Tensor], prefix: str) -> int:
        self._stack_listed(state_dict, prefix)
        found = [state_dict[prefix + n] for n in self.state_dict() if prefix + n in state_dict]
        return len(found[0]) if found else 0

    def store(
        self, state_dict: dict[str, Tensor], prefix: str, name: str, copies: list[Tensor]
    ) -> None:
        state_dict[prefix + name] = torch.stack(copies)

    def _stack_listed(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Stack the entries of a checkpoint whose experts are a list of modules."""
        for name in self.state_dict():
            listed: list[Tensor] = []
            while (key := f'{prefix}{len(listed)}.{self.dense_scope}{name}') in state_dict:
                listed.append(state_dict[key])
            if listed:
                for e in range(len(listed)):
                    del state_dict[f'{prefix}{e}.{self.dense_scope}{name}']
                self.store(state_dict, prefix, name, listed)
