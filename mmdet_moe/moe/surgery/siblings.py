"""Sibling layers as one expert: what a model finds where they were.

A head runs ``for conv in self.cls_convs: x = conv(x)`` and then ``self.retina_cls(x)``, in code of
its own. One expert is all of them, and the MoE layer runs when the first of them is called. What
the model is given instead of its output is a :class:`Parcel`, which it can do nothing with but hand
it to the next of them; the last one hands out the output. So whatever the model computes between
them, an activation or a second use of the features, is noticed and never skipped in silence.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.moe.layer import MoELayer


class Chain(nn.Module):
    """One expert made of siblings: ``forward`` runs them, and those in lists, one after the other.

    Args:
        siblings: The modules by their names; each maps what the one before it returns.
        path: Theirs, for messages.
    """

    def __init__(self, siblings: dict[str, nn.Module], path: str) -> None:
        super().__init__()
        self.path = path
        for name, module in siblings.items():
            self.add_module(name, module)

    @property
    def steps(self) -> list[nn.Module]:
        """All modules that are called, in order."""
        steps: list[nn.Module] = []
        for module in self.children():
            steps += module if isinstance(module, nn.ModuleList) else [module]
        return steps

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...).

        Raises:
            ConfigError: If a step cannot compute what the one before it returns.
        """
        first, *others = self.steps
        x = first(x)
        for number, step in enumerate(others, 2):
            with explained(
                f'"{self.path}": layer {number} of {len(others) + 1} cannot compute what the one '
                'before it returns, so probably they do not run one after the other; give each '
                "an entry of its own, as with '.*'"
            ):
                x = step(x)
        return x


class Parcel:
    """The output of an MoE layer on its way to the place where the model expects it."""

    def __init__(self, content: Any, layer: MoELayer) -> None:
        self._content = content
        self._layer = layer

    def open(self) -> Any:
        """The output."""
        return self._content

    def _refuse(self, used: str) -> NoReturn:
        siblings = ' and '.join(self._layer.siblings)
        raise ConfigError(
            f'The model uses what comes out between the layers of "{self._layer.name}" itself '
            f'({used}), so {siblings} cannot be one expert; choose layers that run one after '
            'the other with nothing in between'
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
        parcel = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Parcel))
        parcel._refuse(getattr(func, '__name__', str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith('__'):
            raise AttributeError(name)
        self._refuse(f'its {name}')


def _refuse_operator(name: str) -> Callable:
    return lambda parcel, *_: parcel._refuse(name.strip('_'))


for _name in ('add', 'radd', 'sub', 'rsub', 'mul', 'rmul', 'truediv', 'neg', 'getitem', 'iter'):
    setattr(Parcel, f'__{_name}__', _refuse_operator(_name))


class Placeholder(nn.Module):
    """Stands where one of the siblings stood.

    Args:
        layer: The MoE layer, which is registered elsewhere.
        is_first: Whether it is the one whose call runs the layer.
        is_last: Whether it is the one that hands out the output.
    """

    def __init__(self, layer: MoELayer, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is not registered a second time
        self.is_first, self.is_last = is_first, is_last

    def forward(self, x: Tensor | Parcel, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, pass its output on, or hand it out."""
        (layer,) = self._layer
        if self.is_first:
            x = Parcel(layer(x, *args, **kwargs), layer)
        elif not isinstance(x, Parcel):
            raise ConfigError(
                f'The layers of "{layer.name}" ({", ".join(layer.siblings)}) do not run one after '
                f'the other: one of them is called with a {type(x).__name__} that does not come '
                'from the one before it; choose layers that do'
            )
        return x.open() if self.is_last else x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith('_'):
                raise
            # Of a group, no single layer's settings can be told.
            raise AttributeError(
                f'"{self._layer[0].name}" has become experts, and the layers that were there are '
                f'inside of them: there is no "{name}"'
            ) from None


def placeholders(layer: MoELayer, chain: Chain) -> dict[str, nn.Module]:
    """What to put in the place of each sibling of a chain."""
    count, last = 0, len(chain.steps) - 1

    def one() -> Placeholder:
        nonlocal count
        count += 1
        return Placeholder(layer, count == 1, count - 1 == last)

    return {
        name: nn.ModuleList(one() for _ in module) if isinstance(module, nn.ModuleList) else one()
        for name, module in chain.named_children()
    }
