"""Multilinear mixtures of experts in place of linear layers, 1×1 convolutions and MLPs."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final, Literal

from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdet_moe.checks import check_flag, check_integer
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.expert_layer import ExpertLayer, Observer
from mmdet_moe.moe.items import Items, Pixels, Tokens
from mmdet_moe.moe.mumoe.factors import FACTORISATIONS, CPFactors, Factors, TRFactors
from mmdet_moe.moe.mumoe.gate import ExpertGate
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS

MATCH: Final = 'match'
Rank = int | Sequence[int] | Literal['match']


class MuMoE(ExpertLayer):
    """A layer of E experts whose weights are one tensor in factorised form (arXiv 2402.12550).

    ``y = sum_n a_n (W_n x + b_n)`` with coefficients ``a = entmax15(Norm(x G))``. All experts take
    part in every item, and neither the tensor nor any expert's matrix is ever formed, so thousands
    cost what one linear layer does. With several levels of experts their coefficients multiply:
    ``a[n1, n2] = a1[n1] · a2[n2]``; index ``n`` counts row by row.

    The journey of an input: rows of vectors → :meth:`coefficients` → :meth:`mix` → its old shape.

    Args:
        in_features: Of the input, I.
        num_experts: E, or the experts of each level.
        norm: ``'bn'`` or ``'ln'``, see :class:`~mmdet_moe.moe.mumoe.gate.ExpertGate`.
        activation: ``'entmax15'`` or ``'softmax'``.

    Attributes:
        levels: The experts of each level.
        experts: The :class:`~mmdet_moe.moe.mumoe.factors.Factors` whose output is the layer's.
    """

    experts: Factors

    def __init__(
        self, in_features: int, num_experts: int | Sequence[int], norm: str, activation: str
    ) -> None:
        super().__init__()
        self.levels = _levels(num_experts)
        self.num_experts = self.top_k = prod(self.levels)
        self.granularity = 'token'
        check_integer(type(self).__name__, 'in_features', in_features, 1)
        self.gate = ExpertGate(in_features, self.levels, norm, activation)
        # Of a kind that handles can refer to weakly.
        self._observers: OrderedDict[int, Observer] = OrderedDict()
        self.register_load_state_dict_pre_hook(_warn_of_dense_weights)

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """(T, N) for each level, of rows (T, I): non-negative, with the sum 1."""
        return self.gate(x)

    def mix(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """The mixture (T, O) of rows (T, I).

        May be replaced on an instance for a while, which is how the analysis changes coefficients.
        """
        return self.experts(x, coefficients)

    def mix_without(self, x: Tensor, coefficients: Sequence[Tensor], expert: int) -> Tensor:
        """:meth:`mix` with one expert's contribution zeroed; the others keep their coefficients."""
        return self.experts.without(x, coefficients, expert)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: (..., I); a feature map (N, I, H, W) for :class:`MuMoEConv1x1`.

        Returns:
            (..., O), or (N, O, H', W').

        Raises:
            ConfigError: If the input has another number of features, or is on another device; and
                for a single row in training with ``norm='bn'``, of which there is no variance.
        """
        rows, restore = self.as_rows(x)
        if rows.shape[-1] != self.in_features:
            raise ConfigError(
                f'μMoE layer "{self.name}" takes inputs of {self.in_features} features, got '
                f'{tuple(x.shape)}; set in_features={rows.shape[-1]}'
            )
        if self.training and self.gate.norm == 'bn' and rows.shape[0] == 1:
            raise ConfigError(
                f'μMoE layer "{self.name}" is trained with a single row, of which batch '
                "normalisation knows no variance; set norm='ln', or a larger batch"
            )
        try:
            logits = self.gate.logits(rows)
        except RuntimeError:
            self.check_device(x)
            raise
        coefficients = self.gate.activate(logits)
        if self._observers:
            self._tell(x, logits, coefficients)
        return restore(self.mix(rows, coefficients))

    def observe(self, observer: Observer) -> RemovableHandle:
        """Be told of the coefficients of each call as a Routing in which all E experts are chosen.

        It has (T, E) numbers, as nothing else of the layer has.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def _tell(self, x: Tensor, logits: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        weights, sums = coefficients[0], logits[0]
        for a, of_level in zip(coefficients[1:], logits[1:], strict=True):
            weights = (weights[:, :, None] * a[:, None]).flatten(1)
            sums = (sums[:, :, None] + of_level[:, None]).flatten(1)
        weights, expert_ids = weights.sort(dim=1, descending=True, stable=True)
        x = x if x.dim() > 1 else x[None]
        routing = Routing(expert_ids, weights, sums, (len(weights),), x.shape[0])
        items = [self._items(x)]
        for observer in list(self._observers.values()):
            observer(routing, items)

    def _items(self, x: Tensor) -> Items:
        return Tokens.of(x)

    def as_rows(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The rows (T, I) of an input, and how the output gets its shape."""
        shape = x.shape[:-1]
        return x.reshape(-1, x.shape[-1]), lambda y: y.reshape(*shape, y.shape[-1])

    @property
    def in_features(self) -> int:
        """I."""
        return self._input.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.experts.out_features

    @property
    def _input(self) -> Factors:
        """The factors that the input meets first."""
        return self.experts

    def load_official(self, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
        """Load what the authors' ``MuMoE`` module saved.

        Args:
            state_dict: With ``projs.*`` (gate), ``MuMoE.factors.*`` (for two layers
                ``MuMoE2.factors.*`` besides) and ``bn.*``, behind ``prefix``; other entries are
                ignored.
            prefix: Of the module in it, such as ``'head.'``.

        Raises:
            ConfigError: If it does not fit.
        """
        names = self._official_names()
        known = {*names.values(), 'input_ln.', 'bn.0.', 'MuMoE2.'}
        found = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(tuple(prefix + name for name in known))
        }
        if normed := [key for key in found if key.startswith('input_ln.')]:
            raise ConfigError(
                f"'{prefix}{normed[0]}' normalises the input of the experts alone (apply_ln=True), "
                'which μMoE layers here do not'
            )
        own = {}
        for key, value in found.items():
            name, official = next(((n, o) for n, o in names.items() if key.startswith(o)), ('', ''))
            own[name + key.removeprefix(official)] = value
        expected = self.state_dict()
        if missing := sorted(set(expected) - set(own)):
            name, official = next((n, o) for n, o in names.items() if missing[0].startswith(n))
            raise ConfigError(
                f"the state dict lacks '{prefix}{official}{missing[0].removeprefix(name)}'; it is "
                f'not that of a μMoE of {len(self.levels)} levels with norm={self.gate.norm!r}, or '
                f'prefix={prefix!r} is wrong'
            )
        for key, (name, tensor) in zip(found, own.items(), strict=True):
            is_factor = name.startswith(('experts.factors.', 'hidden.factors.'))
            if not is_factor and (name not in expected or tensor.shape != expected[name].shape):
                raise ConfigError(
                    f"'{prefix}{key}' of the shape {tuple(tensor.shape)} has no place in a "
                    f'{type(self).__name__} of {self.in_features} inputs, {self.levels} experts '
                    f'and norm={self.gate.norm!r}; the layer has to be the one that was saved'
                )
        self.load_state_dict(own)

    def official_state_dict(self, prefix: str = '') -> dict[str, Tensor]:
        """The state dict as the authors' ``MuMoE`` module has it, the inverse of load_official."""
        official = {}
        for key, value in self.state_dict().items():
            name, theirs = next(
                (n, o) for n, o in self._official_names().items() if key.startswith(n)
            )
            official[prefix + theirs + key.removeprefix(name)] = value
        return official

    def _official_names(self) -> dict[str, str]:
        """By our prefix of state dict entries, theirs."""
        return {
            'gate.weights.': 'projs.',
            'gate.norms.': f'{self.gate.norm}.',
            'experts.': 'MuMoE.',
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_observers': OrderedDict()}  # copies are observed by nobody

    def extra_repr(self) -> str:
        levels = ' × '.join(map(str, self.levels))
        return f'{self.in_features}, {self.out_features}, experts: {levels}'


class MuMoELinear(MuMoE):
    """In place of a linear layer; see :class:`CPMuMoE` and :class:`TRMuMoE`."""

    kind: type[Factors]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int | Sequence[int],
        rank: Rank,
        bias: bool = True,
        norm: str = 'bn',
        activation: str = 'entmax15',
        budget: int | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, norm, activation)
        (self.experts,) = _factors(
            self, self.kind, [(in_features, out_features)], rank, bias, budget
        )


@MODELS.register_module()
class CPMuMoE(MuMoELinear):
    """A CP-factorised μMoE in place of a linear layer, on inputs (..., I).

    Args:
        in_features: I.
        out_features: O.
        num_experts: E, or the experts of each level of a hierarchy, such as ``(64, 64)``.
        rank: R; or ``'match'``: the largest with which the layer, gate included, has no more
            parameters than the linear layer in whose place it stands.
        bias: Whether every expert has a bias.
        norm: Of the gate's logits: ``'bn'`` over the batch, ``'ln'`` over the experts.
        activation: ``'entmax15'`` or ``'softmax'``.
        budget: For ``rank='match'``: another number of parameters.

    Raises:
        ConfigError: For options out of range, and for a budget that no rank keeps.
    """

    kind = CPFactors


@MODELS.register_module()
class TRMuMoE(MuMoELinear):
    """A tensor-ring μMoE in place of a linear layer, on inputs (..., I).

    Args: as :class:`CPMuMoE`, but
        rank: One number, or one for each core (levels, input, output): the rank before it. With
            ``'match'`` those around the experts are 4 and the one between input and output is the
            largest possible, as in the authors' experiments.
    """

    kind = TRFactors


@MODELS.register_module()
class MuMoEConv1x1(MuMoE):
    """A μMoE in place of a 1×1 convolution, one decision per pixel, on maps (N, C, H, W).

    Args: as :class:`CPMuMoE`, but
        in_channels: C.
        out_channels: C'.
        factorisation: ``'cp'`` or ``'tr'``.
        stride: Of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_experts: int | Sequence[int],
        rank: Rank,
        factorisation: str = 'cp',
        stride: int = 1,
        bias: bool = True,
        norm: str = 'bn',
        activation: str = 'entmax15',
        budget: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_experts, norm, activation)
        check_integer(type(self).__name__, 'stride', stride, 1)
        self.granularity, self.stride = 'pixel', stride
        kind = _kind(factorisation)
        (self.experts,) = _factors(self, kind, [(in_channels, out_channels)], rank, bias, budget)

    @property
    def in_channels(self) -> int:
        """C."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """C'."""
        return self.out_features

    def _items(self, x: Tensor) -> Pixels:
        shape = self._strided(x).shape
        # What is left out by strides has no memory format of its own.
        return replace(Pixels.of(x), shape=(shape[0], *shape[2:]))

    def _strided(self, x: Tensor) -> Tensor:
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]

    def as_rows(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if x.dim() != 4:
            raise ConfigError(
                f'μMoE layer "{self.name}" takes inputs (N, C, H, W), got {tuple(x.shape)}'
            )
        rows = self._strided(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        return rows, self._items(x).place


@MODELS.register_module()
class MuMoEMLP(MuMoE):
    """Two μMoE layers with an activation between, and one gate for both, on inputs (..., I).

    Args: as :class:`CPMuMoE`, but
        hidden_features: H.
        factorisation: ``'cp'`` or ``'tr'``.
        rank: Of both layers; ``'match'`` compares with an MLP of two linear layers.
        act: Between the layers. Default: GELU.
        drop: Dropout behind each layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_experts: int | Sequence[int],
        rank: Rank,
        factorisation: str = 'cp',
        bias: bool = True,
        norm: str = 'bn',
        activation: str = 'entmax15',
        budget: int | None = None,
        act: nn.Module | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, norm, activation)
        sizes = [(in_features, hidden_features), (hidden_features, out_features)]
        self.hidden, self.experts = _factors(self, _kind(factorisation), sizes, rank, bias, budget)
        self.act = nn.GELU() if act is None else act
        self.hidden_drop: nn.Module = nn.Dropout(drop)
        self.drop: nn.Module = nn.Dropout(drop)

    @property
    def _input(self) -> Factors:
        return self.hidden

    def mix(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """As :meth:`MuMoE.mix`."""
        hidden = self.hidden_drop(self.act(self.hidden(x, coefficients)))
        return self.drop(self.experts(hidden, coefficients))

    def mix_without(self, x: Tensor, coefficients: Sequence[Tensor], expert: int) -> Tensor:
        """As :meth:`MuMoE.mix_without`, in both layers."""
        hidden = self.hidden_drop(self.act(self.hidden.without(x, coefficients, expert)))
        return self.drop(self.experts.without(hidden, coefficients, expert))

    def _official_names(self) -> dict[str, str]:
        return {**super()._official_names(), 'hidden.': 'MuMoE.', 'experts.': 'MuMoE2.'}


def _warn_of_dense_weights(layer: MuMoE, state_dict: dict, prefix: str, *_: Any) -> None:
    mine = [key for key in state_dict if key.startswith(prefix)]
    if layer.replaces and mine and f'{prefix}gate.weights.0' not in mine:
        print_log(
            f'{layer.name}: the weights of a dense {layer.replaces} cannot be loaded into the '
            'factors of a μMoE, which keeps its own; it has to be trained',
            logger='current',
            level=logging.WARNING,
        )


def _levels(num_experts: Any) -> tuple[int, ...]:
    is_listed = isinstance(num_experts, Sequence) and not isinstance(num_experts, str)
    levels = tuple(num_experts) if is_listed else (num_experts,)
    for size in levels:
        check_integer('μMoE', 'num_experts', size, 2)
    if not levels:
        raise ConfigError('μMoE: num_experts=() must have at least one level of experts')
    return levels


def _kind(factorisation: str) -> type[Factors]:
    if factorisation not in FACTORISATIONS:
        raise ConfigError(
            f'factorisation={factorisation!r} is unknown; use one of {tuple(FACTORISATIONS)}'
        )
    return FACTORISATIONS[factorisation]


def _factors(
    layer: MuMoE,
    kind: type[Factors],
    sizes: Sequence[tuple[int, int]],
    rank: Rank,
    bias: bool,
    budget: int | None,
) -> list[Factors]:
    """The factors of one or two layers, each of the sizes (I, O), with the same rank."""
    owner = type(layer).__name__
    check_flag(owner, 'bias', bias)
    for size_in, size_out in sizes:
        check_integer(owner, 'in_features', size_in, 1)
        check_integer(owner, 'out_features', size_out, 1)
    if rank == MATCH:
        rank = _matching_rank(layer, kind, sizes, bias, budget)
    elif budget is not None:
        raise ConfigError(f"{owner}: budget={budget} needs rank='match', not rank={rank!r}")
    return [kind(layer.levels, *size, rank, bias) for size in sizes]


def _matching_rank(
    layer: MuMoE,
    kind: type[Factors],
    sizes: Sequence[tuple[int, int]],
    bias: bool,
    budget: int | None,
) -> int | tuple[int, ...]:
    gate = sum(weight.numel() for weight in layer.gate.weights)
    if budget is None:
        budget = sum(size_in * size_out + bias * size_out for size_in, size_out in sizes)
    check_integer(type(layer).__name__, 'budget', budget, 1)
    # Of two layers together: as of one whose modes are theirs, one after the other.
    dims = (
        *(size * len(sizes) for size in layer.levels),
        sum(size_in + bias for size_in, _ in sizes),
        sum(size_out for _, size_out in sizes),
    )
    rank = kind.matching_rank(dims, budget - gate)
    if rank is None:
        raise ConfigError(
            f"{type(layer).__name__}: rank='match' has {budget} parameters to spend, of which the "
            f'gate takes {gate}; the smallest feasible budget for {layer.num_experts} experts is '
            f'{gate + sum(dims)}: set budget, fewer experts, or more levels of experts'
        )
    return rank
