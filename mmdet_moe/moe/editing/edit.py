"""What an edit is."""

from dataclasses import dataclass

from torch import Tensor

from mmdet_moe.checks import check_flag, check_integer, check_number
from mmdet_moe.errors import ConfigError


@dataclass(frozen=True)
class Edit:
    """One change of what an expert contributes, before it is weighted.

    Args:
        layer: Name of the layer in the model, such as ``'head.fc'``.
        expert: n, from 0. With several levels of experts: the index in row-major order.
        output: o, from 0: a class of a classifier's last layer, a channel of a feature map. None:
            all outputs.
        scale: ``c -> scale · c``.
        add: ``c -> c + add``.
        zero: ``c -> 0``.

    Raises:
        ConfigError: Unless exactly one of the three is given, and all values are of their kind.
    """

    layer: str
    expert: int
    output: int | None
    scale: float | None = None
    add: float | None = None
    zero: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise ConfigError(f"Edit: layer={self.layer!r} must be a layer's name in the model")
        check_integer('Edit', 'expert', self.expert, 0)
        if self.output is not None:
            check_integer('Edit', 'output', self.output, 0)
        check_flag('Edit', 'zero', self.zero)
        given = {
            'scale': self.scale is not None, 'add': self.add is not None, 'zero': self.zero
        }  # fmt: skip
        if sum(given.values()) != 1:
            names = ' and '.join(name for name, is_given in given.items() if is_given) or 'none'
            raise ConfigError(
                f'Edit of layer "{self.layer}": give exactly one of scale, add and zero=True, '
                f'not {names}'
            )
        for name in ('scale', 'add'):
            if given[name]:
                check_number('Edit', name, getattr(self, name))

    @property
    def factor(self) -> float | None:
        """What the contribution is multiplied with; None for ``add``."""
        return 0.0 if self.zero else self.scale

    @property
    def term(self) -> float:
        """What is added to the contribution; 0 where it is multiplied."""
        return 0.0 if self.add is None else self.add

    def of(self, contribution: Tensor, dim: int) -> Tensor:
        """The edited contribution of a given one, whose outputs lie along ``dim``."""
        edited = contribution.clone()
        part = edited if self.output is None else edited.select(dim, self.output)
        part.add_(self.term) if self.factor is None else part.mul_(self.factor)
        return edited

    def __str__(self) -> str:
        outputs = 'all outputs' if self.output is None else f'output {self.output}'
        change = f'{self.add:+g}' if self.factor is None else f'× {self.factor:g}'
        return f'layer "{self.layer}", expert {self.expert}, {outputs}: {change}'
