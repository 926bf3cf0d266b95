"""Soft constraints: auxiliary losses on one :class:`Routing`.

Every sum over items runs over all ranks (:func:`~mmdet_moe.moe.distributed.global_sum`) and counts
each decision with its ``decision_weights``; with uniform ones the formulas are the papers'.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.distributed import global_sum
from mmdet_moe.moe.metrics import coefficient_of_variation_squared, entropy, shares
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS

_EPS = 1e-10


class BalancingLoss(nn.Module, ABC):
    """Base class: ``weight · compute(routing)``.

    Args:
        weight: λ, at least 0.
        within: ``'level'``: the loss is that of each pyramid level alone, averaged over the levels
            by what their decisions count, so that every level uses all experts and no expert can
            have a level of its own. Default: the decisions of all levels are pooled.

    Raises:
        ConfigError: For a weight that is no finite number of at least 0 (below, it would reward
            imbalance), and an unknown ``within``.
    """

    #: Whether the loss keeps all experts in use by itself.
    balances = True
    #: Whether it reads :attr:`Routing.sources`.
    needs_sources = False

    def __init__(self, weight: float = 0.5, within: str | None = None) -> None:
        super().__init__()
        check_number(type(self).__name__, 'weight', weight, least=0)
        if within not in (None, 'level'):
            raise ConfigError(
                f"{type(self).__name__}: within={within!r} is unknown; use 'level' or None"
            )
        self.weight = weight
        self.within = within

    def forward(self, routing: Routing) -> Tensor:
        """The weighted loss, a scalar of at least float32."""
        if self.within is None:
            return self.weight * self.compute(routing)
        levels = [routing.of_level(i) for i in range(len(routing.items_per_level))]
        counts = torch.stack([level.known_decision_weights().sum() for level in levels])
        losses = torch.stack([self.compute(level) for level in levels])
        return self.weight * (shares(global_sum(counts)) * losses).sum()

    @abstractmethod
    def compute(self, routing: Routing) -> Tensor:
        """The loss before its weight."""

    def extra_repr(self) -> str:
        return f'weight={self.weight}, within={self.within!r}'


def _mean_over_items(values: Tensor, routing: Routing) -> Tensor:
    """Mean of (T, …) values over the items of all ranks, weighted by what each decision counts."""
    decision = routing.known_decision_weights().to(values.dtype)
    total = global_sum((values * decision.view(-1, *(1,) * (values.dim() - 1))).sum(0))
    return total / global_sum(decision.sum()).clamp(min=_EPS)


@MODELS.register_module()
class ImportanceLoss(BalancingLoss):
    """``Var(I) / (mean(I)² + 1e-10)`` of the importance I, unbiased variance over the experts.

    arXiv 2204.10598 after arXiv 1701.06538, equation 7.
    """

    def compute(self, routing: Routing) -> Tensor:
        return coefficient_of_variation_squared(global_sum(routing.importance(balancing=True)))


@MODELS.register_module()
class KLLoss(BalancingLoss):
    """KL divergence of the experts' shares of importance from the uniform distribution.

    ``sum_i p_i log(p_i · E)`` with ``p_i = (I_i + 1e-10) / T`` (arXiv 2204.10598). The sum of the
    importance stands for T: the two are equal when the weights of an item sum to 1, and with Switch
    weights, which sum to less, dividing by T would reward low confidence instead of balance.
    """

    def compute(self, routing: Routing) -> Tensor:
        importance = global_sum(routing.importance(balancing=True)) + _EPS
        p = importance / importance.sum()
        return (p * torch.log(p * routing.num_experts)).sum()


@MODELS.register_module()
class VarianceLoss(BalancingLoss):
    """Minus the variance of each expert's weight over the batch, averaged over the experts.

    Pushes the decisions for different inputs apart (arXiv 2204.10598). The biased variance, so that
    one sample gives 0. It balances nothing by itself: combine it with another loss.
    """

    balances = False

    def compute(self, routing: Routing) -> Tensor:
        weights_TE = routing.dense_weights()
        # A function of two global sums: only so is its gradient right across ranks, too.
        mean = _mean_over_items(weights_TE, routing)
        return (mean**2 - _mean_over_items(weights_TE**2, routing)).mean()


@MODELS.register_module()
class SwitchLoss(BalancingLoss):
    """``E · sum_i f_i P_i``: share of routed rows times mean probability (arXiv 2101.03961, eq. 4).

    f_i counts the k choices of every item and is divided by k, so that perfect balance costs 1 for
    every k; P is the softmax over all E logits.
    """

    def __init__(self, weight: float = 0.01, within: str | None = None) -> None:
        super().__init__(weight, within)

    def compute(self, routing: Routing) -> Tensor:
        load = global_sum(routing.load(balancing=True))
        f = load / load.sum().clamp(min=_EPS)
        p = _mean_over_items(routing.logits.softmax(dim=-1), routing)
        return routing.num_experts * (f * p).sum()


@MODELS.register_module()
class RouterZLoss(BalancingLoss):
    """Mean of ``logsumexp(logits)²``: keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    It balances nothing by itself: combine it with another loss.
    """

    balances = False

    def __init__(self, weight: float = 1e-3, within: str | None = None) -> None:
        super().__init__(weight, within)

    def compute(self, routing: Routing) -> Tensor:
        return _mean_over_items(routing.logits.logsumexp(dim=-1) ** 2, routing)


@MODELS.register_module()
class EntropyLoss(BalancingLoss):
    """Entropy of the router's probabilities (softmax over all E logits), in nats.

    Args:
        weight: λ.
        over: ``'batch'``: ``log E − H(mean_x p(x))``, at least 0, asks for balance;
            ``'item'``: ``mean_x H(p(x))``, asks for sharp decisions. The sum of the two, up to a
            constant, is minus the mutual information between input and expert.
    """

    def __init__(self, weight: float = 0.1, over: str = 'batch', within: str | None = None) -> None:
        super().__init__(weight, within)
        if over not in ('batch', 'item'):
            raise ConfigError(f"EntropyLoss: over={over!r} is unknown; use 'batch' or 'item'")
        self.over = over
        self.balances = over == 'batch'

    def compute(self, routing: Routing) -> Tensor:
        p = routing.logits.softmax(dim=-1)
        if self.over == 'item':
            return _mean_over_items(entropy(p), routing)
        mean = _mean_over_items(p, routing)
        # The sum is 1, or 0 for a batch in which no decision counts.
        return mean.detach().sum() * math.log(routing.num_experts) - entropy(mean)


@MODELS.register_module()
class DatasetLoss(BalancingLoss):
    """``mean_x −log sum_{e in S(x)} p_e(x)``: S(x) are the experts of the data set of x's image.

    The cross-entropy of the router's probabilities (softmax over all E logits) against the data
    set; with one expert for each it is DAMEX's (arXiv 2311.04894). It keeps all experts in use as
    long as no data set has more of them than the k that are chosen.

    Args:
        weight: λ.
        sources: How many data sets D there are: experts ``⌈dE/D⌉ … ⌈(d+1)E/D⌉ − 1`` are those of
            data set d, or expert d mod E where there are more data sets than experts. Or a list
            with the expert, or the experts, of each. By default as many as the training's
            :class:`~mmdet_moe.datasets.JointDataset` joins, which
            :class:`~mmdet_moe.engine.BalancingLossHook` looks up.

    Raises:
        ConfigError: For no data set, or one without experts; in the first iteration for an expert
            that the layer, or an image of a data set that ``sources`` does not have, and where
            nobody has told how many there are.
    """

    needs_sources = True

    def __init__(
        self, weight: float = 0.1, sources: int | Sequence[int | Sequence[int]] | None = None
    ) -> None:
        super().__init__(weight)
        known: int | list[list[int]] | None = (
            sources
            if sources is None or isinstance(sources, int)
            else [list(of) if isinstance(of, (list, tuple)) else [of] for of in sources]
        )
        if isinstance(known, int):
            check_integer('DatasetLoss', 'sources', known, 1)
        elif known is not None:
            for expert in chain(*known):
                check_integer('DatasetLoss', 'an expert of sources', expert, 0)
            if not (known and all(known)):
                raise ConfigError(
                    f'DatasetLoss: sources={known} must be the number of data sets, at least 1, or '
                    'a list with at least one expert for each of them'
                )
        self.sources = known

    def tell_sources(self, found: int | None) -> None:
        """How many data sets the training has.

        Args:
            found: None if that is not known.

        Raises:
            ConfigError: Nobody knows, or ``sources`` says otherwise.
        """
        if self.sources is None:
            if found is None:
                raise ConfigError(
                    'DatasetLoss has to know how many data sets there are; join them by '
                    'mmdet_moe.JointDataset, which tells it and marks each image with its '
                    '`dataset_source`, or set sources'
                )
            self.sources = found
        known = self.sources if isinstance(self.sources, int) else len(self.sources)
        if found not in (None, known):
            raise ConfigError(
                f'DatasetLoss: sources={self.sources} is for {known} data sets, but the training '
                f'has {found}; leave it out to have it as many'
            )

    def experts_of(self, num_experts: int) -> list[list[int]]:
        """The experts of each data set, of E."""
        if self.sources is None:
            raise ConfigError('DatasetLoss: set sources to the number of data sets')
        if not isinstance(self.sources, int):
            return self.sources
        if self.sources > num_experts:
            return [[d % num_experts] for d in range(self.sources)]
        experts = range(num_experts)
        return [
            [e for e in experts if e * self.sources // num_experts == d]
            for d in range(self.sources)
        ]

    def compute(self, routing: Routing) -> Tensor:
        if routing.sources is None:
            raise ConfigError(
                'DatasetLoss: nobody has told the routing the data sets of its images; set '
                'routing.sources to the number of the data set of each image'
            )
        experts_of = self.experts_of(routing.num_experts)
        known = max(max(experts) for experts in experts_of) < routing.num_experts
        if not known or max(routing.sources, default=0) >= len(experts_of):
            raise ConfigError(
                f'DatasetLoss: sources={self.sources} does not fit a layer of '
                f'{routing.num_experts} experts and images of data set '
                f'{max(routing.sources, default=0)}, all counted from 0'
            )
        others_DE = torch.ones(len(experts_of), routing.num_experts, dtype=torch.bool)
        for d, experts in enumerate(experts_of):
            others_DE[d, experts] = False
        others_NE = others_DE[list(routing.sources)].to(routing.logits.device)
        own_TE = routing.logits.masked_fill(others_NE[routing.image_ids], float('-inf'))
        return _mean_over_items(routing.logits.logsumexp(-1) - own_TE.logsumexp(-1), routing)
