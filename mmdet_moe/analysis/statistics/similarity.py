"""How alike the experts of a layer are: by their weights, and by what they make of the same inputs.

Weights can only say that experts are copies of each other. Neurons have no order, so two experts
that compute the same with their hidden channels permuted have weights with a cosine near 0; it
starts at 1 for experts that began as copies of one, where it tells how far they have come. Outputs
are compared at the same items by every expert, whoever the router would send there: by their cosine
(are they the same?), and by linear CKA (are they the same up to a rotation and a scale?).

Letters: E experts, n examples (items, or positions of items that are maps), C features.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmdet_moe.analysis.attribution import replaced
from mmdet_moe.analysis.data import AnalysisData, drawn
from mmdet_moe.analysis.interventions import MANY_EXPERTS
from mmdet_moe.analysis.models import load_weights
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher, unpack
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.mumoe import Factors, MuMoE

#: Images whose inputs every expert is given.
IMAGES = 32
#: Items of one call, positions of one item and examples of one layer, at most.
MAX_ITEMS, MAX_POSITIONS, MAX_EXAMPLES = 64, 16, 4096
#: Numbers of all experts' outputs together that are kept of a layer: wide outputs of many experts
#: have fewer examples, of which CKA without bias takes few anyway.
MAX_VALUES = 1 << 26
#: With fewer examples for each feature than that, CKA is estimated without bias; from at most so
#: many of them, because it takes n x n numbers for each expert.
FEW_EXAMPLES, MAX_UNBIASED = 10, 512
_LEAST = 64  # examples, however large they are


def too_many(layer: ExpertLayer) -> str | None:
    """Why the experts of a layer are not compared; None if they are."""
    if layer.num_experts < 2:
        return 'there is one expert alone'
    if layer.num_experts > MANY_EXPERTS:
        return f'{layer.num_experts} experts are more than the {MANY_EXPERTS} that are compared'
    return None


# Of vectors and features --------------------------------------------------------------------------


def cosines(gram: Tensor) -> np.ndarray:
    """Cosines of E vectors from their products (E, E), float64; of a zero vector NaN, 1 to itself.

    Args:
        gram: Symmetric, float64.
    """
    length = gram.diagonal().sqrt()
    length = torch.where(length > 0, length, torch.nan)
    found = (gram / (length[:, None] * length)).clamp(-1, 1).fill_diagonal_(1)
    return found.cpu().numpy()


def linear_cka(features: Tensor) -> np.ndarray:
    """Linear CKA of every two experts' features of the same examples (arXiv 1905.00414).

    ``|YᵀX|² / (|XᵀX| |YᵀY|)`` with Frobenius norms and columns centred, equation 3 there with
    linear kernels. It is biased upwards where there are few examples for each feature: then with
    the unbiased estimator of HSIC (Song et al., JMLR 2012, equation 5), which can be below 0.

    Args:
        features: (E, n, C), n at least 4.

    Returns:
        float64 (E, E), 1 on the diagonal; NaN for an expert whose output is constant.
    """
    is_biased = features.shape[1] >= FEW_EXAMPLES * features.shape[2]
    features = (features if is_biased else features[:, :MAX_UNBIASED]).double()
    centred = features - features.mean(1, keepdim=True)
    hsic = (_hsic if is_biased else _unbiased_hsic)(centred)
    # What differs by rounding errors alone says nothing.
    constant = centred.abs().amax((1, 2)) <= 1e-6 * features.abs().amax((1, 2))
    return cosines(hsic.masked_fill(constant[:, None] | constant, torch.nan))


def _hsic(features: Tensor) -> Tensor:
    """(E, E): HSIC of every two experts' centred features (E, n, C), up to a factor."""
    experts = range(len(features))
    hsic = features.new_zeros(len(features), len(features))
    for a in experts:
        for b in experts[: a + 1]:
            hsic[a, b] = hsic[b, a] = (features[a].T @ features[b]).square().sum()
    return hsic


def _unbiased_hsic(features: Tensor) -> Tensor:
    """(E, E): without bias, up to the factor ``1 / (n (n − 3))``."""
    kernels = features @ features.transpose(1, 2)
    kernels.diagonal(dim1=1, dim2=2).zero_()
    n = kernels.shape[1]
    rows = kernels.sum(2)
    total = rows.sum(1)
    flat = kernels.flatten(1)
    hsic = flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2))
    return hsic - 2 / (n - 2) * rows @ rows.T


# Of weights -------------------------------------------------------------------------------------


def weight_cosines(layer: ExpertLayer) -> np.ndarray:
    """Cosine of every two experts' weights: kernels and matrices, without biases and norms.

    Of a μMoE layer one expert's matrix after the other is formed from the factors, and not kept.

    Args:
        layer: With at most :data:`~mmdet_moe.analysis.interventions.MANY_EXPERTS` experts.

    Returns:
        float64 (E, E); NaN beside the diagonal for an expert whose weights are 0.
    """
    gram = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    with torch.no_grad():
        for rows in _weights(layer):
            rows = rows.detach().flatten(1).cpu()
            # In parts, so that not all of it is in float64 at once.
            for part in rows.split(1 << 20, dim=1):
                part = part.double()
                gram += part @ part.T
    return cosines(gram)


def _weights(layer: ExpertLayer) -> Iterator[Tensor]:
    """The experts' weights, (E, ...) for each tensor that an expert has."""
    if isinstance(layer, MuMoE):
        for factors in (m for m in layer.modules() if isinstance(m, Factors)):
            rows = slice(factors.in_features)  # the last row is the bias
            yield torch.stack([factors.expert_weight(e)[rows] for e in range(layer.num_experts)])
        return
    experts = layer.experts
    if isinstance(experts, ModuleExperts):
        each = zip(*(list(expert.parameters()) for expert in experts), strict=True)
        stacked = list(each)
    else:
        stacked = [parameter.unbind(0) for parameter in experts.parameters()]
    kernels = [parameters for parameters in stacked if parameters[0].dim() > 1]
    for parameters in kernels or stacked:
        yield torch.stack(list(parameters))


# Of outputs -------------------------------------------------------------------------------------


class _Outputs:
    """What every expert of one layer makes of the same examples."""

    def __init__(self, layer: ExpertLayer, seed: int) -> None:
        self.layer = layer
        self._generator = torch.Generator().manual_seed(seed)
        # Those with the smallest keys are the sample, uniform over all examples.
        self._examples, self._keys = [], []
        self._latest = torch.empty(0)

    def run_experts(
        self, usual: Callable, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any
    ) -> Any:
        """Stands in for the ``run_experts`` of a sparse layer."""
        count = len(x_T)
        # A whole map is given again for every expert that somebody chose.
        is_new = not dispatcher.is_whole or not torch.equal(x_T, self._latest.to(x_T))
        self._latest = x_T
        if count and is_new:
            chosen = self._some(count, MAX_ITEMS).to(x_T.device)

            def items(value: Any) -> Any:
                return value[chosen] if isinstance(value, Tensor) and len(value) == count else value

            rows, (more, named) = x_T[chosen], tree_map(items, (args, kwargs))

            def alone(expert: int) -> Tensor:
                ids = torch.full((len(rows), 1), expert, device=rows.device)
                ones = dispatcher.weights.new_ones(ids.shape)
                to_one = Dispatcher(ids, ones, self.layer.num_experts)
                return unpack(usual(rows, to_one, *more, **named))[0]

            self._keep(alone)
        return usual(x_T, dispatcher, *args, **kwargs)

    def mix(self, usual: Callable, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Stands in for the ``mix`` of a μMoE layer."""
        if len(x):
            chosen = self._some(len(x), MAX_ITEMS).to(x.device)

            def alone(expert: int) -> Tensor:
                only = [torch.zeros_like(a[chosen]) for a in coefficients]
                for a, number in zip(only, self.layer.experts.place(expert), strict=True):
                    a[:, number] = 1
                return usual(x[chosen], tuple(only))

            self._keep(alone)
        return usual(x, coefficients)

    def _some(self, count: int, most: int) -> Tensor:
        """So many of them, drawn at random, ascending."""
        if count <= most:
            return torch.arange(count)
        return torch.randperm(count, generator=self._generator)[:most].sort().values

    def _keep(self, alone: Callable[[int], Tensor]) -> None:
        """Keep the same examples of what each expert makes, (items, C, ...)."""
        examples, chosen = [], None
        for expert in range(self.layer.num_experts):
            y = alone(expert)
            if y.dim() > 2:  # maps (C, H, W), or sequences (L, C)
                y = y if y.dim() == 3 else y.flatten(2).transpose(1, 2)
                if chosen is None:
                    chosen = self._some(y.shape[1], MAX_POSITIONS).to(y.device)
                y = y[:, chosen].flatten(0, 1)
            examples.append(y.float().cpu())
        self._examples.append(torch.stack(examples))
        self._keys.append(torch.rand(len(examples[0]), generator=self._generator))
        if sum(map(len, self._keys)) > 2 * self._most():
            self._shrink()

    def _most(self) -> int:
        """Examples that are kept."""
        experts, _, features = self._examples[0].shape
        return min(MAX_EXAMPLES, max(_LEAST, MAX_VALUES // (experts * features)))

    def _shrink(self) -> None:
        examples, keys = torch.cat(self._examples, dim=1), torch.cat(self._keys)
        kept = keys.argsort()[: self._most()].sort().values
        self._examples, self._keys = [examples[:, kept]], [keys[kept]]

    def features(self) -> Tensor | None:
        """(E, n, C); None if there are none."""
        if not self._keys:
            return None
        self._shrink()
        return self._examples[0]


@torch.no_grad()
def outputs_of(
    model: nn.Module, layers: dict[str, ExpertLayer], batches: Iterator[dict]
) -> dict[str, Tensor]:
    """What every expert makes of some of the inputs that its layer is given.

    Args:
        model: In evaluation mode; afterwards as before.
        layers: Its layers by name, none with too many experts.
        batches: As the data loader gives them.

    Returns:
        By layer, float32 (E, n, C); without those that were not run.
    """
    kept = {name: _Outputs(layer, seed) for seed, (name, layer) in enumerate(layers.items())}
    with ExitStack() as stack:
        for name, layer in layers.items():
            method = 'run_experts' if isinstance(layer, MoELayer) else 'mix'
            stand_in = partial(getattr(kept[name], method), getattr(layer, method))
            stack.enter_context(replaced(layer, method, stand_in))
        for batch in batches:
            data = model.data_preprocessor(batch, False)
            model(**data, mode='predict')
    found = {name: outputs.features() for name, outputs in kept.items()}
    return {name: features for name, features in found.items() if features is not None}


# All of it --------------------------------------------------------------------------------------


def expert_similarity(
    model: nn.Module, layers: dict[str, ExpertLayer], data: AnalysisData
) -> dict[str, dict]:
    """``layers.<layer>.similarity`` of ``experts.json``, by layer.

    Args:
        model: In evaluation mode.
        layers: Its layers by name.
        data: Of whose images :data:`IMAGES`, drawn at random, are used.
    """
    compared = {name: layer for name, layer in layers.items() if too_many(layer) is None}
    outputs = {}
    if compared:
        images = drawn(len(data), IMAGES)
        outputs = outputs_of(model, compared, data.batches(images, num_workers=0))
    found = {}
    for name, layer in layers.items():
        reason = too_many(layer)
        found[name] = {'reason': reason} if reason else _similarity(layer, outputs.get(name))
    return found


def _similarity(layer: ExpertLayer, features: Tensor | None) -> dict:
    weights = weight_cosines(layer)
    found = {'reason': None, 'weights': {'cosine': _listed(weights)}, 'outputs': None}
    distance_of, alike = 'weights', weights
    if features is not None and features.shape[1] >= 4:
        flat = features.flatten(1).double()
        cka = linear_cka(features)
        found['outputs'] = {
            'cosine': _listed(cosines(flat @ flat.T)),
            'cka': _listed(cka),
            'num_examples': features.shape[1],
        }
        distance_of, alike = 'outputs', cka
    distance = squareform((1 - np.nan_to_num(alike)).clip(0), checks=False)
    return {
        **found,
        'linkage_of': distance_of,
        'linkage': linkage(distance, 'average').tolist(),
    }


def over_training(
    model: nn.Module, layers: Iterable[str], checkpoints: dict[int, Path]
) -> dict[str, dict[str, list]]:
    """How the similarity of the experts' weights goes on in a training.

    Args:
        model: Is not changed.
        layers: Names of its layers.
        checkpoints: Of the same model, by iteration or epoch, see :func:`checkpoints_in`.

    Returns:
        By layer: ``step`` (S), ascending, and ``mean``, ``least`` and ``most`` of the cosines of
        two experts' weights, (S) each; without layers that are not compared.

    Raises:
        ConfigError: If a checkpoint is of another model.
    """
    copied = copy.deepcopy(model).cpu()
    compared = {name: copied.get_submodule(name) for name in layers}
    compared = {name: layer for name, layer in compared.items() if too_many(layer) is None}
    found = {name: {'step': [], 'mean': [], 'least': [], 'most': []} for name in compared}
    for step, path in sorted(checkpoints.items()):
        load_weights(copied, str(path))
        for name, layer in compared.items():
            matrix = weight_cosines(layer)
            values = matrix[~np.eye(len(matrix), dtype=bool)]
            known = np.isfinite(values).any()
            found[name]['step'].append(step)
            for key, reduce in (('mean', np.nanmean), ('least', np.nanmin), ('most', np.nanmax)):
                found[name][key].append(float(reduce(values)) if known else None)
    return found


def checkpoints_in(work_dir: Path) -> dict[int, Path]:
    """The checkpoints that a training left in its folder, by iteration, or else by epoch."""
    for kind in ('iter', 'epoch'):
        names = re.compile(rf'{kind}_(\d+)\.pth')
        found = {path: names.fullmatch(path.name) for path in work_dir.glob('*.pth')}
        steps = {int(match[1]): path for path, match in found.items() if match}
        if steps:
            return steps
    return {}


def _listed(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in matrix]


def mean_between(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """The mean similarity of two different experts; None where none is known."""
    values = np.array(matrix, float)[~np.eye(len(matrix), dtype=bool)]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
