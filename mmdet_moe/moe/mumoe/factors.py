"""The experts' weight tensor ``W[n1, n2, …, i, o]``, which is never formed.

Letters: T rows, N experts of a level, E experts of all levels together, I and O features of the
input and the output, R ranks. With a bias the input mode has I + 1 entries; the last is the bias.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.checks import check_integer
from mmdet_moe.errors import ConfigError


class Factors(nn.Module, ABC):
    """``y_o = sum_{n,i} W[n, i, o] a_n x_i`` (arXiv 2402.12550, equation 1) from the factors of W.

    Parameters are interchangeable with the authors' code: one list, the experts' modes first, then
    the input's, then the output's.

    Args:
        levels: Experts of each level.
        in_features: I.
        out_features: O.
        rank: See the subclass.
        bias: Whether every expert has a bias.
    """

    #: Which dimensions of each factor are ranks.
    rank_dims: tuple[int, ...]

    def __init__(
        self,
        levels: tuple[int, ...],
        in_features: int,
        out_features: int,
        rank: int | Sequence[int],
        bias: bool,
    ) -> None:
        super().__init__()
        self.levels, self.in_features, self.out_features = levels, in_features, out_features
        self.bias = bias
        self.dims = (*levels, in_features + bias, out_features)
        self.factors = nn.ParameterList(
            [torch.empty(shape) for shape in self.shapes(self.dims, rank)]
        )
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_take_size)

    @staticmethod
    @abstractmethod
    def shapes(dims: tuple[int, ...], rank: int | Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of the factors of a tensor with the sizes ``dims``.

        Raises:
            ConfigError: For a rank that is none.
        """

    @staticmethod
    @abstractmethod
    def matching_rank(dims: tuple[int, ...], budget: int) -> int | tuple[int, ...] | None:
        """The largest rank with at most so many parameters; None if there is none."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw initial weights as the paper does (appendix), but for :func:`_spread`."""

    @abstractmethod
    def forward(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """The mixture.

        Args:
            x: (T, I).
            coefficients: (T, N) for each level.

        Returns:
            (T, O).
        """

    @abstractmethod
    def expert_output(self, x: Tensor, expert: int) -> Tensor:
        """``W_n x + b_n`` of one expert, without its coefficient: (T, O) of (T, I)."""

    @abstractmethod
    def add_term(self, expert: int, input: Tensor, output: Tensor) -> None:
        """``W[n] += input ∘ output``, exactly; the rank grows by one.

        Args:
            expert: Index among all E, row by row over the levels.
            input: (I,), or (I + 1,) with a bias.
            output: (O,).
        """

    @abstractmethod
    def materialise(self) -> Tensor:
        """The whole tensor (N₁, N₂, …, I (+ 1), O): for tests and small layers."""

    @abstractmethod
    def expert_weight(self, expert: int) -> Tensor:
        """``W[n]`` of one expert, (I, O), or (I + 1, O) with its bias last."""

    def without(self, x: Tensor, coefficients: Sequence[Tensor], expert: int) -> Tensor:
        """The mixture with one expert's contribution zeroed; nobody takes its place."""
        place = self.place(expert)
        shares = zip(coefficients, place, strict=True)
        own = reduce(torch.mul, (a[..., n, None] for a, n in shares))
        y = self(x, coefficients)
        return y - own.to(y.dtype) * self.expert_output(x, expert)

    def place(self, expert: int) -> tuple[int, ...]:
        """The index on each level of an index among all experts."""
        check_integer(type(self).__name__, 'expert', expert, 0)
        if expert >= prod(self.levels):
            raise ConfigError(f'expert={expert} is none of the {prod(self.levels)} experts')
        return tuple(map(int, np.unravel_index(expert, self.levels)))

    def _replace(self, values: Sequence[Tensor]) -> None:
        # In the same parameters: an optimizer that has no state of them goes on with them.
        for factor, value in zip(self.factors, values, strict=True):
            put(factor, value)

    def extra_repr(self) -> str:
        shapes = ', '.join(str(tuple(factor.shape)) for factor in self.factors)
        return f'{self.in_features}, {self.out_features}, bias={self.bias}, factors: {shapes}'


class CPFactors(Factors):
    """``W = sum_r U[:, r] ∘ V[:, r] ∘ Z[:, r]``, so ``y = Z ((Uᵀa) * (Vᵀx))`` (equation 2).

    Factors: (N, R) for each level, (I (+ 1), R), (O, R). ``rank``: R.
    """

    rank_dims = (1,)

    @staticmethod
    def shapes(dims: tuple[int, ...], rank: int | Sequence[int]) -> list[tuple[int, ...]]:
        columns = check_integer('CPMuMoE', 'rank', rank, 1)
        return [(size, columns) for size in dims]

    @staticmethod
    def matching_rank(dims: tuple[int, ...], budget: int) -> int | None:
        return budget // sum(dims) or None if budget > 0 else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        *experts, input, output = self.factors
        for level, factor in enumerate(experts):
            nn.init.normal_(factor, 1.0, _spread(level))
        nn.init.uniform_(input, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.uniform_(output, -(output.shape[1] ** -0.5), output.shape[1] ** -0.5)

    def forward(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        *experts, _, output = self.factors
        hidden = self._hidden(x)
        for a, factor in zip(coefficients, experts, strict=True):
            hidden = hidden * (a.to(x.dtype) @ factor)
        return F.linear(hidden, output)

    def expert_output(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(self._hidden(x) * self._of_expert(expert), self.factors[-1])

    def expert_weight(self, expert: int) -> Tensor:
        return (self.factors[-2] * self._of_expert(expert)) @ self.factors[-1].T

    @torch.no_grad()
    def add_term(self, expert: int, input: Tensor, output: Tensor) -> None:
        columns = [
            F.one_hot(torch.tensor(n), size)
            for n, size in zip(self.place(expert), self.levels, strict=True)
        ]
        self._replace(
            [
                torch.cat([factor, column.to(factor)[:, None]], dim=1)
                for factor, column in zip(self.factors, [*columns, input, output], strict=True)
            ]
        )

    def materialise(self) -> Tensor:
        whole = self.factors[0]
        for factor in self.factors[1:-1]:
            whole = whole[..., None, :] * factor
        return whole @ self.factors[-1].T

    def _of_expert(self, expert: int) -> Tensor:
        return prod(
            factor[n] for factor, n in zip(self.factors[:-2], self.place(expert), strict=True)
        )

    def _hidden(self, x: Tensor) -> Tensor:
        """``Vᵀx``, (T, R)."""
        factor = self.factors[-2]
        if not self.bias:
            return F.linear(x, factor.T)
        return F.linear(x, factor[:-1].T, factor[-1])


class TRFactors(Factors):
    """A tensor ring: third-order cores, contracted in a circle over their ranks (equation 4).

    Factors: (R₁, N, R₂) for each level, (R₂, I (+ 1), R₃), (R₃, O, R₁). ``rank``: all of them, one
    for each factor, or one number.
    """

    rank_dims = (0, 2)

    @staticmethod
    def shapes(dims: tuple[int, ...], rank: int | Sequence[int]) -> list[tuple[int, ...]]:
        given = rank if isinstance(rank, (list, tuple)) else [rank] * len(dims)
        ranks = [check_integer('TRMuMoE', 'rank', value, 1) for value in given]
        if len(ranks) != len(dims):
            raise ConfigError(
                f'TRMuMoE: rank={rank!r} has {len(ranks)} numbers for {len(dims)} factors '
                f'({len(dims) - 2} levels of experts, input, output); give {len(dims)} numbers, or '
                'one for all'
            )
        return [(ranks[i], size, ranks[(i + 1) % len(dims)]) for i, size in enumerate(dims)]

    @staticmethod
    def matching_rank(dims: tuple[int, ...], budget: int) -> tuple[int, ...] | None:
        # Ranks of 4 around the experts and the rest between input and output, as in the authors'
        # experiments; where that is too much, or the rest less than that, all ranks alike.
        *levels, size_in, size_out = dims
        inner = (budget - 16 * sum(levels)) // (4 * (size_in + size_out))
        if inner >= 4:
            return (*[4] * (len(levels) + 1), inner)
        rank = int((max(budget, 0) / sum(dims)) ** 0.5)
        return (rank,) * len(dims) if rank else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        *experts, input, output = self.factors
        for level, core in enumerate(experts):
            slices = torch.eye(core.shape[0], core.shape[2])[:, None].repeat(1, core.shape[1], 1)
            core.copy_(slices * (1 + _spread(level) * torch.randn_like(slices)))
        nn.init.uniform_(input, -(self.in_features**-0.5), self.in_features**-0.5)
        bound = (output.shape[0] * output.shape[2]) ** -0.5
        nn.init.uniform_(output, -bound, bound)

    def forward(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        levels = zip(coefficients, self.factors[:-2], strict=True)
        chain = reduce(torch.matmul, (_contract(a.to(x.dtype), core) for a, core in levels))
        return self._output(chain, x)

    def expert_output(self, x: Tensor, expert: int) -> Tensor:
        return self._output(self._of_expert(expert), x)

    def expert_weight(self, expert: int) -> Tensor:
        return torch.einsum(
            'pq,qir,rop->io', self._of_expert(expert), self.factors[-2], self.factors[-1]
        )

    @torch.no_grad()
    def add_term(self, expert: int, input: Tensor, output: Tensor) -> None:
        vectors = [
            F.one_hot(torch.tensor(n), size)
            for n, size in zip(self.place(expert), self.levels, strict=True)
        ]
        grown = []
        # The trace of a product of block diagonals is the sum of the blocks' own.
        for core, vector in zip(self.factors, [*vectors, input, output], strict=True):
            core = F.pad(core, (0, 1, 0, 0, 0, 1))
            core[-1, :, -1] = vector.to(core)
            grown.append(core)
        self._replace(grown)

    def materialise(self) -> Tensor:
        ring = self.factors[0]
        for core in self.factors[1:-1]:
            ring = torch.tensordot(ring, core, dims=1)
        return torch.einsum('p...q,qop->...o', ring, self.factors[-1])

    def _of_expert(self, expert: int) -> Tensor:
        levels = zip(self.factors[:-2], self.place(expert), strict=True)
        return reduce(torch.matmul, (core[:, n] for core, n in levels))

    def _output(self, chain: Tensor, x: Tensor) -> Tensor:
        """(T, O) from the contracted experts' cores, (T, R₁, R₂) or (R₁, R₂), and the input."""
        input, output = self.factors[-2:]
        link = _contract(x, input[:, :-1], input[:, -1]) if self.bias else _contract(x, input)
        ring = (chain @ link).flatten(-2)  # (T, R₁ · R₃)
        return ring @ output.permute(2, 0, 1).flatten(0, 1)


def put(parameter: nn.Parameter, value: Tensor, grad: Tensor | None = None) -> None:
    """Give a parameter a value and a gradient, of any shape."""
    # While a graph lives, autograd expects gradients of the old shape, unless the dtype changed.
    other = torch.float32 if value.dtype == torch.float16 else torch.float16
    parameter.grad, parameter.data = None, value.new_empty(0, dtype=other)
    parameter.data, parameter.grad = value, grad


def _spread(level: int) -> float:
    """Standard deviation of what the experts of a level start with, whose mean is 1.

    With the paper's 0 for all but the first level their experts are alike, and since the gate
    starts at 0 they get equal gradients and stay alike: the level is never used.
    """
    return 1.0 if level == 0 else 0.01


def _contract(rows: Tensor, core: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, R, R') of rows (T, N) and a core (R, N, R')."""
    matrix = core.permute(0, 2, 1).flatten(0, 1)
    y = F.linear(rows, matrix, None if bias is None else bias.flatten())
    return y.unflatten(-1, (core.shape[0], core.shape[2]))


FACTORISATIONS: dict[str, type[Factors]] = {'cp': CPFactors, 'tr': TRFactors}


def _take_size(module: Factors, state_dict: dict, prefix: str, *_) -> None:
    """Before loading: take the ranks of what is loaded, which edits raise; refuse other tensors."""
    found = {}
    for key in state_dict:
        name = key.removeprefix(f'{prefix}factors.')
        if name != key and name.isdigit():
            found[int(name)] = state_dict[key]
    if not found:
        return
    shapes = [tuple(found[i].shape) for i in sorted(found)]
    dims = [shape[1] if len(shape) == 3 else (*shape, 0)[0] for shape in shapes]
    if len(found) < 3 or max(found) >= len(found):
        raise ConfigError(
            f'{prefix}factors: the state dict has only the factors {sorted(found)}; it lacks some'
        )
    if len(found) != len(module.factors):
        raise ConfigError(
            f'{prefix}factors: the state dict has {len(found)} factors ({len(found) - 2} levels of '
            f'experts), the layer {len(module.factors)} ({len(module.levels)} levels); give the '
            f'layer num_experts={dims[:-2]}'
        )
    expected = [tuple(factor.shape) for factor in module.factors]
    if shapes == expected:
        return
    if any(len(shape) != len(expected[0]) for shape in shapes) or tuple(dims) != module.dims:
        raise ConfigError(
            f'{prefix}factors: the state dict has the shapes {shapes}, the layer {expected}; only '
            'ranks may differ'
        )
    rank = [shape[0] for shape in shapes] if len(shapes[0]) == 3 else shapes[0][1]
    if module.shapes(module.dims, rank) != shapes:
        raise ConfigError(
            f'{prefix}factors: the ranks of the shapes {shapes} in the state dict do not match'
        )
    module._replace([factor.new_empty(found[i].shape) for i, factor in enumerate(module.factors)])
