"""Routers: from feature maps to one :class:`Routing`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_moe.checks import check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.constraints import Constraint
from mmdet_moe.moe.distributed import global_sum_, own_random
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.kmeans_start import KMeansStart
from mmdet_moe.moe.pass_states import PassStates, in_backward
from mmdet_moe.moe.patches import PatchGrid
from mmdet_moe.moe.precision import KeepsPrecision, no_autocast
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS, build

#: Former names of the values of the option ``softmax``.
FORMER_SOFTMAX = {'kept': 'over_chosen', 'all': 'over_all'}
SOFTMAX = ('over_chosen', 'over_all', 'straight_through')


class _Linear(nn.Linear):
    pass


class RouterLinear(_Linear):
    """A linear layer that an ``init_cfg`` for all ``Linear`` layers of a model passes by.

    MMEngine goes by the names of a layer's class and of its bases. Large or equal initial weights
    of a router would choose some experts for ever.
    """


class Router(nn.Module, ABC):
    """Base class: noisy top-k over the logits of a subclass (arXiv 2204.10598, section 3).

    Each routed item is pooled to a vector, mapped to E logits, and its k best experts get the
    weights. All arithmetic is in float32 (or float64) under any autocast.

    Args:
        in_channels: Channels C of the routed feature maps.
        num_experts: E, at least 1.
        top_k: k, between 1 and E.
        softmax: ``'over_chosen'``: softmax over the k chosen logits, so the weights of an item sum
            to 1. ``'over_all'``: softmax over all E logits before the choice (Switch, arXiv
            2101.03961), so they sum to less, and a single chosen expert still has a gradient.
            ``'straight_through'``: the weights of ``'over_chosen'`` with the gradient of
            ``'over_all'``: a single chosen expert counts in full, and its router still learns.
            Default: ``'over_chosen'`` for k > 1, ``'over_all'`` for k = 1. (The values of earlier
            versions, ``'kept'`` and ``'all'``, are still understood.)
        noise: What is added to the logits in training, for the choice as for the weights. ``True``:
            ``eps · softplus(W_noise · GAP(x) + 0.01)``, ``eps ~ N(0, 1)``. ``'uniform'``: a number
            of U[0, 1] for every expert (arXiv 2208.02813). ``False``: nothing. Default: True
            without a constraint, False with one (noise and a hard constraint exclude each other).
            Each rank draws its own, also where all have the same seed, as MMEngine's have.
        constraint: Config or instance of a :class:`~mmdet_moe.moe.constraints.Constraint`.

    Raises:
        ConfigError: For values out of range, and for ``softmax='over_chosen'`` with k = 1 < E,
            which gives the router no gradient at all: the weight is the constant 1.
    """

    #: Whether it computes on whole feature maps, and so cannot route tokens.
    needs_maps = False

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        top_k: int,
        softmax: str | None = None,
        noise: bool | str | None = None,
        constraint: Constraint | dict | None = None,
    ) -> None:
        super().__init__()
        for field, value in (('num_experts', num_experts), ('top_k', top_k)):
            if not isinstance(value, int):
                raise ConfigError(f'{field}={value!r} must be an integer')
        if num_experts < 1:
            raise ConfigError(f'num_experts={num_experts}: an MoE layer needs at least 1 expert')
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f'top_k={top_k} must lie between 1 and num_experts={num_experts}; '
                'lower top_k or add experts'
            )
        if softmax is None:
            softmax = 'over_all' if top_k == 1 else 'over_chosen'
        elif softmax in FORMER_SOFTMAX:
            _warn_once(f"softmax='{softmax}' is now called softmax='{FORMER_SOFTMAX[softmax]}'")
            softmax = FORMER_SOFTMAX[softmax]
        if softmax not in SOFTMAX:
            raise ConfigError(f'softmax={softmax!r} is unknown; use one of {SOFTMAX}')
        if softmax == 'over_chosen' and top_k == 1 < num_experts:
            raise ConfigError(
                "softmax='over_chosen' with top_k=1 makes every weight the constant 1, so the "
                "router gets no gradient and cannot learn; use softmax='straight_through'"
            )
        if isinstance(constraint, dict):
            constraint = build({**constraint, 'num_experts': num_experts})
        if constraint is not None and not isinstance(constraint, Constraint):
            raise ConfigError(
                f'constraint={constraint!r} must be a config, such as '
                "dict(type='mmdet_moe.RelativeImportanceConstraint')"
            )
        if constraint is not None and constraint.num_experts != num_experts:
            raise ConfigError(
                f'constraint is for {constraint.num_experts} experts, the router for {num_experts}'
            )
        if noise is None:
            noise = constraint is None
        if not isinstance(noise, bool) and noise != 'uniform':
            raise ConfigError(f"noise={noise!r} is unknown; use True, False or 'uniform'")
        if noise and constraint is not None and constraint.excludes_noise:
            raise ConfigError(
                f'noise={noise!r} cannot be combined with constraint={type(constraint).__name__}, '
                'whose decisions it would undo; set noise=False'
            )
        self.in_channels = in_channels
        self.num_experts = num_experts
        self.top_k = top_k
        self.softmax = softmax
        self.constraint = constraint
        self.noise = noise
        self.noise_fc = None
        if noise is True:
            self.noise_fc = RouterLinear(in_channels, num_experts, bias=False)
            # Equal noise for every expert at the start, as in arXiv 1701.06538.
            nn.init.zeros_(self.noise_fc.weight)

    @abstractmethod
    def compute_logits(self, x: Tensor, items: Items) -> Tensor:
        """Logits (items, E) of one feature map (N, C, H, W), without noise, at least float32.

        With tokens, the input is (..., C) instead of a map; ``items.pool`` knows the difference.
        """

    def forward(
        self, x: Tensor | Sequence[Tensor], items: Sequence[Items] | None = None
    ) -> Routing:
        """Route one feature map, or all pyramid levels of a batch together.

        Args:
            x: (N, C, H, W), or a sequence of such maps with the same N and C. Tokens: (N, ..., C),
                or a sequence of such inputs with the same N and C.
            items: The items of each map; by default every image of every map is one item.

        Returns:
            One Routing for all items, with uniform ``decision_weights``.

        Raises:
            ValueError: If the maps hold different numbers of images.
        """
        maps = [x] if isinstance(x, Tensor) else list(x)
        num_images = maps[0].shape[0]
        if any(m.shape[0] != num_images for m in maps):
            raise ValueError(
                'all maps must hold the same images, but their first dimensions are '
                f'{[m.shape[0] for m in maps]}'
            )
        if items is None:
            items = [PatchGrid(tuple(level.shape[-2:])) for level in maps]
        if self.num_experts == 1 and type(self).gates is Router.gates:
            return _no_choice(maps, items)
        with no_autocast(maps[0].device.type):
            logits = _cat(self.logits_of_levels(maps, items))
            noisy = logits
            if not self.training:
                pass
            elif self.noise_fc is not None:
                pooled = _cat([p.pooled(m) for m, p in zip(maps, items, strict=True)])
                scale = F.softplus(linear(self.noise_fc, pooled) + 0.01)
                noisy = logits + own_random(torch.randn, logits) * scale
            elif self.noise == 'uniform':
                noisy = logits + own_random(torch.rand, logits)
            for of_map in items:
                of_map.forget_pooled()
            expert_ids, weights = self.choose(noisy, self.training)
            gates = self.gates(noisy, expert_ids, weights)
        return Routing(
            expert_ids=expert_ids,
            weights=weights,
            logits=logits,
            items_per_level=tuple(num_images * p.per_image for p in items),
            num_images=num_images,
            decision_weights=weights.new_ones(weights.shape[0]),
            gates=gates,
        )

    def logits_of_levels(self, maps: list[Tensor], items: Sequence[Items]) -> list[Tensor]:
        """:meth:`compute_logits` of all levels; for subclasses that treat them differently."""
        return [self.compute_logits(m, p) for m, p in zip(maps, items, strict=True)]

    def begin(self) -> None:
        """A pass of the model begins, in which the layer may be called several times."""

    def end(self) -> None:
        """It ends."""

    def choose(self, logits: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The k best experts of every item and their weights.

        Args:
            logits: (T, E).
            training: Whether hard constraints apply.

        Returns:
            ``expert_ids`` (T, K) int64 and ``weights`` (T, K) of the dtype of ``logits``. Where a
            constraint leaves fewer than k experts, the surplus weights are exactly 0.
        """
        if self.constraint is None:
            chosen, expert_ids = logits.topk(self.top_k, dim=-1)
            allowed = logits
        else:
            selection = self.constraint.select(logits, training)
            expert_ids = selection.topk(self.top_k, dim=-1).indices
            allowed = logits.masked_fill(torch.isneginf(selection), float('-inf'))
            chosen = allowed.gather(1, expert_ids)
        if self.softmax == 'over_chosen':
            return expert_ids, chosen.softmax(dim=-1)
        weights = allowed.softmax(dim=-1).gather(1, expert_ids)
        if self.softmax == 'straight_through':
            weights = weights + (chosen.softmax(dim=-1) - weights).detach()
        return expert_ids, weights

    def gates(self, logits: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor | None:
        """What the experts' outputs are multiplied with, where that is not the weights.

        For subclasses to override; the weights go on telling who was chosen.

        Args:
            logits: (T, E), with the noise of the training.
            expert_ids: (T, K), as :meth:`choose` gave them.
            weights: (T, K), as well.

        Returns:
            (T, K), of either sign, 0 where the weight is, or None for the weights.
        """
        return None

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, top_k={self.top_k}, softmax={self.softmax!r}'


@cache
def _warn_once(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def _no_choice(maps: list[Tensor], items: Sequence[Items]) -> Routing:
    """The routing to the only expert, whose weight is 1 whatever its logit: none is computed."""
    num_images = maps[0].shape[0]
    per_level = tuple(num_images * p.per_image for p in items)
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    weights = torch.ones(sum(per_level), 1, dtype=dtype, device=maps[0].device)
    return Routing(
        expert_ids=torch.zeros_like(weights, dtype=torch.int64),
        weights=weights,
        logits=torch.zeros_like(weights),
        items_per_level=per_level,
        num_images=num_images,
        decision_weights=weights[:, 0],
    )


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def linear(fc: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of its input."""
    bias = None if fc.bias is None else fc.bias.to(x.dtype)
    return F.linear(x, fc.weight.to(x.dtype), bias)


class LevelNorm(KeepsPrecision):
    """Normalises each pyramid level to mean 0 and variance 1 of every channel over its items.

    By running statistics, at inference as in training: the decision for an item depends on no other
    one, and is the same in both. They get no gradient. A pass of the model, between :meth:`begin`
    and :meth:`end`, counts as one batch of all of its calls (and of all ranks), and goes by what
    earlier ones left, as it does when an activation checkpoint computes it again; so does a call by
    itself. The first ``1 / momentum`` batches count alike, and go by their own first call, too.

    The variance is that of all items together, as in a mixture of the batch and the past: a batch
    whose mean is elsewhere widens it. That of a first batch of a single item stays 1.

    Args:
        num_levels: L.
        features: Channels F.
        momentum: What a batch counts against the past, after the first ones.

    Attributes:
        mean, variance: float32 (L, F).
        batches: float32 (L,), how many batches a level has seen. No integer, because averages of
            weights (MMEngine's EMA) leave integers as they were in the first iteration.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, num_levels: int, features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer('mean', torch.zeros(num_levels, features))
        self.register_buffer('variance', torch.ones(num_levels, features))
        self.register_buffer('batches', torch.zeros(num_levels))
        self._in_pass = False
        # By level, of this pass: sums, and the mean and variance (2, F) that it goes by.
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._states = [PassStates(f'normalise_levels, level {i}') for i in range(num_levels)]

    def begin(self) -> None:
        """A pass of the model begins, in which a level may come in several calls."""
        self.end()  # should an error have ended the one before
        self._in_pass = True

    def end(self) -> None:
        """It ends: what its calls have seen counts as one batch."""
        self._in_pass = False
        for level, (sums, _) in self._seen.items():
            mean, variance = self._moved(level, sums)
            self.mean[level], self.variance[level] = mean, variance
            self.batches[level] += sums[0, 0] > 0
        self._seen = {}

    def forward(self, features: Tensor, level: int) -> Tensor:
        """(items, F) of one level, at least float32, to the same."""
        if not self.training:
            return _standardised(features, self.mean[level], self.variance[level])
        see = partial(self._see, features.detach(), level)
        return _standardised(features, *self._states[level].remembered(see, features))

    def of_rows(self, rows: Tensor) -> Tensor:
        """(items, F + 1), the last column being the level, to (items, F), as at inference."""
        levels = rows[:, -1].long()
        mean, variance = self.mean.to(rows)[levels], self.variance.to(rows)[levels]
        return _standardised(rows[:, :-1], mean, variance)

    @torch.no_grad()
    def _see(self, features: Tensor, level: int) -> Tensor:
        """Take a call into account, and give the mean and variance (2, F) that it goes by."""
        # Around the mean so far, as the difference of two large squares would be mostly rounding.
        features = features - self.mean[level].to(features.dtype)
        count = features.new_full((features.shape[1],), len(features))
        sums = torch.stack([count, features.sum(0), (features**2).sum(0)])
        global_sum_([sums])
        if level in self._seen:
            earlier, goes_by = self._seen[level]
            self._seen[level] = earlier + sums, goes_by
            return goes_by
        # Without asking how many there were, which would wait for a GPU.
        is_early = self.batches[level] * self.momentum < 1
        known = torch.stack([self.mean[level], self.variance[level]])
        goes_by = torch.where(is_early, torch.stack(self._moved(level, sums)), known)
        self._seen[level] = sums, goes_by
        if not self._in_pass:
            self.end()
        return goes_by

    def _moved(self, level: int, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance with a batch of which these sums (3, F) have been seen."""
        count, batches = sums[0, 0], self.batches[level]
        step, square = sums[1:] / count.clamp(min=1)
        share = (1 / (batches + 1)).clamp(min=self.momentum).to(sums) * (count > 0)
        mean, variance = self.mean[level].to(sums), self.variance[level].to(sums)
        # Of a mixture: (1 - share) · (variance + share · step²) + share · that within the batch.
        moved = (1 - share) * variance + share * (square - share * step**2).clamp(min=0)
        moved = torch.where((batches == 0) & (count == 1), variance, moved)
        return (mean + share * step).to(self.mean), moved.to(self.variance)


def _standardised(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (x - mean.to(x.dtype)) * (variance + 1e-5).rsqrt().to(x.dtype)


class _PooledRouter(Router):
    """Base class of routers whose logits are a linear layer of pooled features."""

    fc: RouterLinear

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        top_k: int,
        bias: bool = True,
        init_std: float = 0.01,
        normalise_levels: int | None = None,
        init: str = 'normal',
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, top_k, **kwargs)
        check_number(type(self).__name__, 'init_std', init_std, least=0)
        if init not in ('normal', 'kmeans'):
            raise ConfigError(f"init={init!r} is unknown; use 'normal' or 'kmeans'")
        if init == 'kmeans' and not bias:
            raise ConfigError("init='kmeans' sets the bias, which bias=False leaves out; leave it")
        if normalise_levels is not None and (
            not isinstance(normalise_levels, int) or normalise_levels < 1
        ):
            raise ConfigError(
                f'normalise_levels={normalise_levels!r} must be the number of feature maps that '
                'the layer is given together, at least 1, or None'
            )
        self._bias, self._init_std = bias, init_std
        self._num_levels = normalise_levels
        self.norm: LevelNorm | None = None
        self.start = KMeansStart(num_experts) if init == 'kmeans' and num_experts > 1 else None

    @abstractmethod
    def features(self, x: Tensor, items: Items) -> Tensor:
        """(items, F) of one feature map (N, C, H, W), at least float32."""

    def compute_logits(self, x: Tensor, items: Items) -> Tensor:
        return linear(self.fc, self.features(x, items))

    def begin(self) -> None:
        if self.norm is None:
            return
        self.norm.begin()
        if self.start is not None and self.start.waits and self.training:
            self.start.in_pass = True
            self.start.set_if_ready(self.fc, self.norm.of_rows)

    def end(self) -> None:
        if self.norm is not None:
            self.norm.end()
        if self.start is not None:
            self.start.in_pass = False

    def logits_of_levels(self, maps: list[Tensor], items: Sequence[Items]) -> list[Tensor]:
        raw = [self.features(m, p) for m, p in zip(maps, items, strict=True)]
        features = self.normalised(raw)
        start, norm = self.start, self.norm
        if start and norm and start.waits and self.training and not in_backward():
            levels = range(len(raw)) if self._num_levels else [0] * len(raw)
            rows = [F.pad(f.detach(), (0, 1), value=n) for f, n in zip(raw, levels, strict=True)]
            start(self.fc, _cat(rows), norm.of_rows)
            # A later call of the same pass may set the weights that this one's gradient needs.
            weight, bias = self.fc.weight.clone(), self.fc.bias.clone()
            return [F.linear(f, weight.to(f.dtype), bias.to(f.dtype)) for f in features]
        return [linear(self.fc, f) for f in features]

    def normalised(self, features: list[Tensor]) -> list[Tensor]:
        """The features of all maps, each as :meth:`features` gives it, as the last layer sees them.

        Raises:
            ConfigError: If they are of more or fewer maps than ``normalise_levels`` says.
        """
        if self.norm is None:
            return features
        if self._num_levels is None:
            return list(self.norm(_cat(features), 0).split([f.shape[0] for f in features]))
        if len(features) != self._num_levels:
            raise ConfigError(
                f'normalise_levels={self._num_levels}, but the router is given '
                f'{len(features)} feature maps together; '
                + (
                    'remove normalise_levels, or set it to 1 to normalise all maps alike'
                    if len(features) == 1
                    else f'set normalise_levels={len(features)}'
                )
            )
        return [self.norm(f, level) for level, f in enumerate(features)]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        done = f'{prefix}start.done'
        if self.start is None:
            state_dict.pop(done, None)
        elif f'{prefix}fc.weight' in state_dict:  # trained, even if from another start
            state_dict.setdefault(done, torch.ones_like(self.start.done))
            self.start.forget()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _build_fc(self, features: int) -> RouterLinear:
        if self._num_levels is not None or self.start is not None:
            self.norm = LevelNorm(self._num_levels or 1, features)
        fc = RouterLinear(features, self.num_experts, bias=self._bias)
        # Small logits: at the start no expert is preferred, and the noise decides.
        nn.init.normal_(fc.weight, std=self._init_std)
        if fc.bias is not None:
            nn.init.zeros_(fc.bias)
        return fc


@MODELS.register_module()
class GAPRouter(_PooledRouter):
    """Global average pooling, then a linear layer (GAP-FC).

    Args:
        **kwargs: As of :class:`Router`.
        bias: Whether the linear layer has a bias.
        init_std: Standard deviation of its initial weights; 0 starts with equal logits.
        normalise_levels: How many pyramid levels the layer is given together, each of which is then
            normalised by itself (:class:`LevelNorm`), so that the router does not see them apart by
            their means. Default: none is. Of a layer with one map: 1.
        init: ``'normal'``, or ``'kmeans'``: the first batches set the weights so that each expert
            is chosen for a cluster of their items
            (:class:`~mmdet_moe.moe.kmeans_start.KMeansStart`), and has something of its own to
            learn from the start on. The features are normalised as by ``normalise_levels``, if that
            is not given over the items of all maps together: what all items have in common would
            move all of them from one expert to another in a single step of the optimizer.
    """

    def __init__(self, in_channels: int, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(in_channels, num_experts, top_k, **kwargs)
        self.fc = self._build_fc(in_channels)

    def features(self, x: Tensor, items: Items) -> Tensor:
        return items.pooled(x)


@MODELS.register_module()
class ConvGAPRouter(_PooledRouter):
    """A 3×3 convolution with ReLU first, then global average pooling and a linear layer.

    Args:
        **kwargs: As of :class:`GAPRouter`.
        conv_channels: Channels of the convolution, 256 in the paper.
    """

    needs_maps = True

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        top_k: int,
        conv_channels: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, top_k, **kwargs)
        self.conv = nn.Conv2d(in_channels, conv_channels, 3, padding=1)
        self.fc = self._build_fc(conv_channels)

    def features(self, x: Tensor, items: Items) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        assert self.conv.bias is not None
        weight, bias = self.conv.weight.to(x.dtype), self.conv.bias.to(x.dtype)
        return items.pool(F.relu(F.conv2d(x, weight, bias, self.conv.stride, padding=1)))
