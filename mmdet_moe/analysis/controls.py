"""What routers that have learned nothing would choose, which associations are compared with.

A bar that says "0.5 nats with the size" means little by itself: a random projection of the features
goes together with the size as well, and so does a table of pyramid levels. So the same numbers are
computed for two controls, from the same decisions:

- ``'random'``: routers of the layer's own architecture with fresh random weights, given the input
  that the layer's router was given in the same pass. Pooled features are dominated by their mean,
  so a fresh router would send everything to the same experts: each logit is therefore standardised
  over the data set, and all are scaled until the mean entropy of a decision is that of the layer's
  own router. A control is then neither less selective than it, nor more.
- ``'level'``: a router that knows the pyramid level alone; each decision has the mean weights of
  its level. Nothing is drawn or trained.

Letters: n rows, D draws of random weights, V logits of a draw, B bins, E experts, L levels.
"""

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdet_moe.analysis.records.contents import ControlRecords, LayerRecords
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.experts.modules import independent_copies
from mmdet_moe.moe.items import at_least_float32
from mmdet_moe.moe.metrics import entropy, mutual_information, shares
from mmdet_moe.moe.mumoe import MuMoE
from mmdet_moe.moe.precision import no_autocast
from mmdet_moe.moe.routers import ConvGAPRouter, GAPRouter, linear

RANDOM, LEVEL = 'random', 'level'
#: How often random weights are drawn; of layers with many experts less often, see MAX_LOGITS.
DRAWS = 5
#: Logits of all draws together that one decision may have, but for the least number of draws, 2.
MAX_LOGITS = 512
#: Decisions that logits are standardised by, at most, and logits of all of them.
MAX_SAMPLE, MAX_SAMPLE_LOGITS = 20_000, 1 << 22
# As many are enough to know the mean entropy of a decision; it is computed for many scales.
_ENTROPY_LOGITS = 1 << 18
_SCALES = (1e-3, 1e3)


class RandomRouters(ABC):
    """Routers of one layer's architecture with random weights, which see what the layer sees.

    Args:
        layer: With at least 2 experts.
        seed: Of the weights, which depend on neither the device nor anything drawn before.
    """

    def __init__(self, layer: ExpertLayer, seed: int) -> None:
        self.layer = layer
        self.draws = max(2, min(DRAWS, MAX_LOGITS // self.num_logits))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._draw()
        self._calls: list[Tensor] = []

    @classmethod
    def of(cls, layer: ExpertLayer, name: str) -> 'RandomRouters | None':
        """Those of a layer of a model; None for one expert, which is no choice."""
        if layer.num_experts < 2:
            return None
        kind = _SparseRouters if isinstance(layer, MoELayer) else _Gates
        return kind(layer, zlib.crc32(name.encode()))

    @property
    @abstractmethod
    def num_logits(self) -> int:
        """V."""

    @abstractmethod
    def _draw(self) -> None:
        """Draw the weights."""

    @abstractmethod
    def attach(self) -> RemovableHandle:
        """See what the layer sees, until the handle's ``remove()``."""

    @abstractmethod
    def _of_rows(self, inputs: Tensor) -> Tensor:
        """The logits (n, D, V) of some rows of what was kept of the calls."""

    @abstractmethod
    def weights(self, logits: Tensor) -> Tensor:
        """The decisions, (..., E) with the sum 1, that logits (..., V) would lead to."""

    def forget(self) -> None:
        """Forget the calls so far."""
        self._calls = []

    @torch.no_grad()
    def logits(self, rows: Tensor) -> np.ndarray:
        """The logits of some decisions since the last :meth:`forget`.

        Args:
            rows: int64 (n,), indices of the decisions, in the order of the layer's own routing.

        Returns:
            float32 (n, D, V).
        """
        calls = torch.cat(self._calls) if len(self._calls) > 1 else self._calls[0]
        logits = self._of_rows(calls[rows.to(calls.device)])
        return logits.float().cpu().numpy()


class _SparseRouters(RandomRouters):
    """Of a sparse layer."""

    @property
    def num_logits(self) -> int:
        return self.layer.num_experts

    def _draw(self) -> None:
        own = self.layer.router
        blank = copy.deepcopy(own).cpu()
        blank.constraint = None  # its bias was learned
        if isinstance(blank, ConvGAPRouter) and self.layer.granularity == 'image':
            # The mean over a map hardly needs every place, and the convolution is all of the cost.
            blank.conv.stride = (2, 2)
        self.routers = independent_copies(blank, self.draws + 1)[1:]
        for router in self.routers:
            for module in router.modules():
                if not hasattr(module, 'reset_parameters'):
                    for parameter in module.parameters(recurse=False):
                        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                        nn.init.normal_(parameter, 0, fan_in**-0.5)
            router.to(next(own.parameters()).device).eval().requires_grad_(False)

    def attach(self) -> RemovableHandle:
        def see(_: nn.Module, inputs: tuple, __: Any) -> None:
            pairs = list(zip(*inputs, strict=True))
            with torch.no_grad(), no_autocast(inputs[0][0].device.type):
                first = self.routers[0]
                if type(first).compute_logits is GAPRouter.compute_logits:
                    # A convolution before the last layer, which costs the most, is drawn once.
                    features = first.normalised([first.features(*pair) for pair in pairs])
                    draws = [linear(router.fc, torch.cat(features)) for router in self.routers]
                else:
                    draws = [torch.cat(router.logits_of_levels(*inputs)) for router in self.routers]
            self._calls.append(torch.stack(draws, dim=1))

        return self.layer.router.register_forward_hook(see)

    def _of_rows(self, inputs: Tensor) -> Tensor:
        return inputs

    def weights(self, logits: Tensor) -> Tensor:
        flat = logits.flatten(0, -2)
        expert_ids, weights = self.routers[0].choose(flat, training=False)
        dense = torch.zeros_like(flat).scatter(1, expert_ids, weights)
        return shares(dense).unflatten(0, logits.shape[:-1])


class _Gates(RandomRouters):
    """Of a μMoE layer: ``x G`` with normally distributed G; several levels' logits side by side."""

    layer: MuMoE

    @property
    def num_logits(self) -> int:
        return sum(self.layer.levels)

    def _draw(self) -> None:
        weight = self.layer.gate.weights[0]
        drawn = torch.randn(weight.shape[0], self.draws * self.num_logits)
        self._weight = drawn.to(weight.device) * weight.shape[0] ** -0.5

    def attach(self) -> RemovableHandle:
        def see(layer: MuMoE, inputs: tuple) -> None:
            self._calls.append(layer.as_rows(inputs[0])[0].detach())

        return self.layer.register_forward_pre_hook(see)

    def _of_rows(self, inputs: Tensor) -> Tensor:
        with no_autocast(inputs.device.type):
            inputs = at_least_float32(inputs)
            return (inputs @ self._weight.to(inputs)).unflatten(1, (self.draws, -1))

    def weights(self, logits: Tensor) -> Tensor:
        flat = logits.flatten(0, -2).split(self.layer.levels, dim=1)
        joint, *others = self.layer.gate.activate(tuple(part.contiguous() for part in flat))
        for of_level in others:
            joint = (joint[:, :, None] * of_level[:, None]).flatten(1)
        return shares(joint).unflatten(0, logits.shape[:-1])


class Controls:
    """What hangs on the decisions of one layer's controls, over a whole data set.

    All records are read twice: :meth:`learn` of each set of records, then :meth:`use` of each,
    followed by :meth:`add` of what hangs on its decisions.

    Args:
        routers: The layer's random ones, whose weights have been drawn as for the records.
        seed: Of the sample that logits are standardised by.
    """

    def __init__(self, routers: RandomRouters, seed: int = 0) -> None:
        self.routers = routers
        self._num_experts = routers.layer.num_experts
        self._rng = np.random.default_rng(seed)
        self._sample: list[tuple[np.ndarray, np.ndarray]] = []
        self._level_sums: dict[int, np.ndarray] = {}
        self._scaling: tuple[np.ndarray, np.ndarray] | None = None
        self._unit, self._weights = np.zeros(0, np.int64), np.zeros(0)
        self._tables: dict[tuple[str, str], dict[int, np.ndarray]] = {}

    def learn(self, records: LayerRecords, share: float) -> None:
        """Take one set of records into account.

        Args:
            records: Of the layer.
            share: The part of the data set's images that is in them.
        """
        made = records.decisions
        known = np.isfinite(made.weights.sum(1)) & (made.weights.sum(1) > 0)
        for level in np.unique(made.level[known & (made.level >= 0)]).tolist():
            found = made.weights[known & (made.level == level)].sum(0, dtype=np.float64)
            self._level_sums[level] = self._level_sums.get(level, 0) + found
        size = self.routers.draws * self.routers.num_logits
        wanted = max(2, int(share * min(MAX_SAMPLE, MAX_SAMPLE_LOGITS // size)))
        rows = np.flatnonzero(known)
        if len(rows) > wanted:
            rows = np.sort(self._rng.choice(rows, wanted, replace=False))
        places = np.searchsorted(records.controls.unit, made.unit[rows])
        self._sample.append((records.controls.logits[places], made.weights[rows]))

    @property
    def names(self) -> list[str]:
        """One for each of the controls' tables: the draws, and the level if there are several."""
        return [RANDOM] * self.routers.draws + [LEVEL] * (len(self._level_sums) > 1)

    def use(self, records: ControlRecords) -> None:
        """What is added from now on hangs on the decisions of these records."""
        if self._scaling is None:
            self._scaling = self._find_scaling()
        mean, factor = self._scaling
        logits = torch.from_numpy((records.logits - mean) * factor)
        found = [self.routers.weights(logits).numpy()]
        if LEVEL in self.names:
            by_level = np.zeros((max(self._level_sums) + 2, self._num_experts))
            for level, sums in self._level_sums.items():
                by_level[level] = sums / sums.sum()
            found.append(by_level[records.level][:, None])  # 0 for the unknown level, -1
        self._unit, self._weights = records.unit, np.concatenate(found, axis=1)

    def _find_scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted from the logits, (D, V), and what they are multiplied with."""
        logits, weights = map(np.concatenate, zip(*self._sample, strict=True))
        self._sample = []
        if not len(logits):
            return np.zeros(logits.shape[1:], np.float32), np.ones(logits.shape[1:], np.float32)
        mean = logits.mean(0, dtype=np.float64).astype(np.float32)
        deviation = logits.std(0, dtype=np.float64).astype(np.float32)
        # A logit that never differs stays 0 instead of becoming rounding errors.
        factor = np.where(deviation > 1e-6 * abs(mean), 1 / np.maximum(deviation, 1e-30), 0)
        # Drawn: data sets may go class by class.
        few = self._rng.permutation(len(logits))[: max(2, _ENTROPY_LOGITS // logits[0].size)]
        standard = torch.from_numpy((logits[few] - mean) * factor.astype(np.float32))
        wanted = float(entropy(shares(torch.from_numpy(weights[few]).double())).mean())

        def is_too_soft(scale: float) -> bool:
            return float(entropy(self.routers.weights(standard * scale).double()).mean()) > wanted

        low, high = np.log(_SCALES)
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if is_too_soft(float(np.exp(middle))) else (low, middle)
        # With one expert for each decision all scales are alike.
        scale = 1.0 if self.routers.layer.top_k == 1 else float(np.exp(high))
        return mean, (factor * scale).astype(np.float32)

    def add(
        self,
        source: str,
        bins: Mapping[str, np.ndarray],
        unit: np.ndarray,
        share: np.ndarray,
        level: np.ndarray,
        sizes: Mapping[str, int],
    ) -> None:
        """Add n things, as to the associations of the same source.

        Args:
            source: Of the associations.
            bins: int64 (n,) by attribute; negative where a thing belongs to none.
            unit: int64 (n,), the decisions; things of one that is not recorded are left out.
            share: float64 (n,), how much of the thing hangs on the decision.
            level: int64 (n,), the thing's own, for the information beyond it.
            sizes: B by attribute.
        """
        places = np.searchsorted(self._unit, unit).clip(max=max(len(self._unit) - 1, 0))
        known = self._unit[places] == unit if len(self._unit) else np.zeros(len(unit), bool)
        weights = self._weights[places[known]] if known.any() else None
        if weights is None:
            return
        controls, experts = weights.shape[1:]
        for attribute, values in bins.items():
            tables = self._tables.setdefault((source, attribute), {})
            mine, of_level = values[known], level[known]
            for each in np.unique(of_level[mine >= 0]).tolist():
                rows = np.flatnonzero((mine >= 0) & (of_level == each))
                hung = sparse.csr_array(
                    (share[known][rows], (mine[rows], np.arange(len(rows)))),
                    shape=(sizes[attribute], len(rows)),
                )
                table = hung @ weights[rows].reshape(len(rows), -1).astype(np.float64)
                table = table.reshape(-1, controls, experts).swapaxes(0, 1)
                tables[each] = tables[each] + table if each in tables else table

    def fill(self, associations: dict[str, dict[str, dict]]) -> None:
        """Put ``controls`` into the associations of ``experts.json``, by source and attribute."""
        for source, attributes in associations.items():
            for attribute, association in attributes.items():
                tables = self._tables.get((source, attribute))
                if tables:
                    association['controls'] = self._informations(tables, attribute != LEVEL)

    def _informations(self, tables: dict[int, np.ndarray], beyond: bool) -> dict[str, dict]:
        """By control: ``mi``, ``given`` (the level, where there are several), and each draw's."""
        stacked = np.stack(list(tables.values()))  # (L, controls, B, E)
        mi = mutual_information(torch.from_numpy(stacked.sum(0))).tolist()
        given = information_within(stacked) if beyond and len(tables) > 1 else None
        found: dict[str, dict] = {}
        for name in dict.fromkeys(self.names):
            which = [i for i, other in enumerate(self.names) if other == name]
            found[name] = {'mi': float(np.mean([mi[i] for i in which]))}
            if name == RANDOM:
                found[name]['draws'] = [mi[i] for i in which]
            found[name]['given'] = {}
            if given is not None:
                found[name]['given'] = {LEVEL: float(np.mean(given[which]))}
                if name == RANDOM:
                    found[name]['draws_given'] = {LEVEL: given[which].tolist()}
        return found


def information_within(tables: np.ndarray) -> np.ndarray:
    """``I(bin; expert | stratum) = sum_s p(s) I_s`` in nats.

    Args:
        tables: float64 (S, ..., B, E), the joint table of each stratum.

    Returns:
        float64 (...); 0 where all tables are empty.
    """
    stacked = torch.from_numpy(tables)
    totals = shares(stacked.sum((-2, -1)), dim=0)
    return (totals * mutual_information(stacked)).sum(0).numpy()
