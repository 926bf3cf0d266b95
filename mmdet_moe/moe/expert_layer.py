"""What all layers of experts have in common, sparse or factorised."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdet_moe.errors import ConfigError, ReplacedAttributeError
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.routing import Routing

#: Told of each call of a layer: the decision, and how each level of the input was divided.
Observer = Callable[[Routing, list[Items]], None]


class ExpertLayer(BaseModule):
    """A layer that weighs E experts for each item: what analysis, surgery and reports rely on.

    A subclass sets ``num_experts`` (E), ``top_k`` (how many of them an item can have) and
    ``granularity`` (what one decision covers, as of :class:`~mmdet_moe.moe.MoELayer`).
    """

    num_experts: int
    top_k: int
    granularity: str

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        #: What the layer stands for in a model that :func:`add_experts` changed: its class's name.
        self.replaces: str | None = None
        #: Siblings that together are one expert, see :mod:`mmdet_moe.moe.surgery`.
        self.siblings: tuple[str, ...] = ()
        #: How wide its experts are inside, relative to the dense module.
        self.width = 1.0
        self._dense: tuple[nn.Module, ...] = ()

    @property
    def dense(self) -> nn.Module | None:
        """What stood here before, on the ``meta`` device; None if that is not known."""
        return self._dense[0] if self._dense else None

    def stand_for(self, dense: nn.Module) -> None:
        """Say what stood here before; it goes to the ``meta`` device, where it costs nothing."""
        self._dense = (dense.to('meta'),)  # in a tuple, so that it is no part of the layer

    @abstractmethod
    def observe(self, observer: Observer) -> RemovableHandle:
        """Be told of what each call decides, until the handle's ``remove()``."""

    def begin(self, by: str | None = None) -> None:
        """A forward pass of the model begins, in which the layer may be called several times."""

    def end(self, by: str | None = None) -> None:
        """It ends."""

    def forget(self) -> None:
        """Forget the latest forward pass, as if there had been none."""

    def check_device(self, x: Tensor) -> None:
        """Complain of an input on another device than a weight; it looks at all weights.

        Raises:
            ConfigError: It is on another one.
        """
        for name, weight in self.named_parameters():
            if weight.device != x.device:
                raise ConfigError(
                    f'the layer of experts "{self.name}" is given an input on {x.device}, but its '
                    f'weight "{name}" is on {weight.device}; move both to one device'
                )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith('_') or not self.__dict__.get('replaces'):
                raise
            return self._attribute_of_replaced(name)

    def _attribute_of_replaced(self, name: str) -> Any:
        """A setting (a number, a text) that a model reads of the layer that stood here."""
        value = getattr(self.dense, name, self)
        if isinstance(value, (int, float, str, tuple, type(None))):
            return value
        raise ReplacedAttributeError(
            f'The model reads the attribute "{name}" of "{self.name}" ({self.replaces}), which has '
            'become experts and has none of its own; choose the path of a module that the model '
            'does nothing with but call it'
        )


def find_expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """All layers of experts of a model by name; each also learns its name, for its messages."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer)}
    for name, layer in layers.items():
        layer.name = name or type(layer).__name__
    return layers
