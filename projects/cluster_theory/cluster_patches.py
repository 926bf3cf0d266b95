"""The cluster-structured classification problem of arXiv 2208.02813, generated in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import DATASETS, FUNCTIONS

#: The paper's four settings: standard deviation of the noise, and range of the other feature.
SETTINGS = {
    's1': {'sigma': 1.0, 'gamma': (0.5, 3.0)},
    's2': {'sigma': 2.0, 'gamma': (0.5, 3.0)},
    's3': {'sigma': 1.0, 'gamma': (0.5, 2.0)},
    's4': {'sigma': 2.0, 'gamma': (0.5, 2.0)},
}
SPLITS = ('train', 'test')


@DATASETS.register_module()
class ClusterPatches(Dataset):
    """Samples of P patches of d numbers each, from K clusters, with a label y = ±1.

    In random order, all multiplied with ``scale``: the label's feature ``α · y · v_k`` of the
    sample's cluster k, the cluster's centre ``β · c_k``, the feature ``γ · ε · v_k'`` of another
    cluster k' with a random sign ε, which misleads, and P − 3 patches of noise
    ``N(0, σ² / d)``. The v and c are orthonormal, everything else is drawn uniformly. The splits of
    one ``seed`` share them and differ in their samples.

    Args:
        setting: ``'s1'`` to ``'s4'``: ``sigma`` and ``gamma`` of the paper.
        split: ``'train'`` or ``'test'``.
        num_samples: N.
        seed: Fixes everything that is drawn; at least 0.
        alpha: Range (low, high) of α.
        beta: Range of β.
        gamma: Range of γ; by default that of the setting.
        sigma: σ; by default that of the setting.
        scale: Factor on all patches, above 0.
        num_clusters: K, at least 2.
        num_patches: P, at least 3.
        patch_dim: d, at least 2 · K.

    Attributes:
        features: float32 (K, d), the v.
        centres: float32 (K, d), the c.
        inputs: float32 (N, d, 1, P), a feature map with a position for every patch.
        labels: int64 (N,): 0 for y = −1, 1 for y = 1.
        clusters: int64 (N,), in 0 … K − 1.

    Raises:
        ConfigError: For unknown names, and values of a wrong type or out of range.
    """

    METAINFO = {'classes': ('negative', 'positive')}

    def __init__(
        self,
        setting: str = 's1',
        split: str = 'train',
        num_samples: int = 16000,
        seed: int = 0,
        alpha: tuple[float, float] = (0.5, 2.0),
        beta: tuple[float, float] = (1.0, 2.0),
        gamma: tuple[float, float] | None = None,
        sigma: float | None = None,
        scale: float = 10.0,
        num_clusters: int = 4,
        num_patches: int = 4,
        patch_dim: int = 50,
    ) -> None:
        if setting not in tuple(SETTINGS):
            raise ConfigError(f'setting={setting!r} is unknown; use one of {tuple(SETTINGS)}')
        if split not in SPLITS:
            raise ConfigError(f'split={split!r} is unknown; use one of {SPLITS}')
        owner = type(self).__name__
        check_integer(owner, 'num_samples', num_samples, least=1)
        check_integer(owner, 'seed', seed, least=0)
        check_integer(owner, 'num_clusters', num_clusters, least=2)
        check_integer(owner, 'num_patches', num_patches, least=3)
        check_integer(owner, 'patch_dim', patch_dim, least=2 * num_clusters)
        check_number(owner, 'scale', scale, above=0)
        sigma = SETTINGS[setting]['sigma'] if sigma is None else sigma
        check_number(owner, 'sigma', sigma, least=0)
        gamma = SETTINGS[setting]['gamma'] if gamma is None else gamma
        ranges = {'alpha': alpha, 'beta': beta, 'gamma': gamma}
        for field, value in ranges.items():
            _check_range(owner, field, value)
        self.metainfo = dict(self.METAINFO)
        directions = _orthonormal(2 * num_clusters, patch_dim, np.random.default_rng((seed, 0)))
        rng = np.random.default_rng((seed, 1 + SPLITS.index(split)))
        sign = rng.integers(0, 2, num_samples) * 2 - 1
        cluster = rng.integers(0, num_clusters, num_samples)
        other = (cluster + rng.integers(1, num_clusters, num_samples)) % num_clusters
        misleading = rng.integers(0, 2, num_samples) * 2 - 1
        lengths = {name: rng.uniform(*range_, num_samples) for name, range_ in ranges.items()}
        # In double precision, as N P-tuples of patches in the order of the definition.
        patches = np.empty((num_samples, num_patches, patch_dim))
        patches[:, 0] = (lengths['alpha'] * sign)[:, None] * directions[cluster]
        patches[:, 1] = lengths['beta'][:, None] * directions[num_clusters + cluster]
        patches[:, 2] = (lengths['gamma'] * misleading)[:, None] * directions[other]
        noise = rng.standard_normal((num_samples, num_patches - 3, patch_dim))
        patches[:, 3:] = noise * (sigma / patch_dim**0.5)
        order = rng.permuted(np.tile(np.arange(num_patches), (num_samples, 1)), axis=1)
        patches = np.take_along_axis(patches, order[:, :, None], axis=1) * scale
        self.features, self.centres = _float32(directions).split(num_clusters)
        # A view: the numbers of a patch stay side by side in memory, as the experts want them.
        self.inputs = _float32(patches).transpose(1, 2).unsqueeze(2)
        self.labels = torch.from_numpy((sign > 0).astype(np.int64))
        self.clusters = torch.from_numpy(cluster.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> dict[str, Any]:
        """One sample, or the batch of a tensor of indices, in the fields of ``PatchMixture``."""
        return {
            'inputs': self.inputs[index],
            'gt_label': self.labels[index],
            'cluster': self.clusters[index],
        }

    def __getitems__(self, indices: Sequence[int]) -> '_Batch':
        """A whole batch, for PyTorch's DataLoader: the full data set in milliseconds."""
        return _Batch(self[torch.as_tensor(indices)])


class _Batch(dict):
    """A batch that is collated already."""


@FUNCTIONS.register_module()
def collate_batch(samples: Sequence[dict] | _Batch) -> dict[str, Any]:
    """``collate_fn`` for data sets that may make whole batches; other samples are stacked."""
    return dict(samples) if isinstance(samples, _Batch) else default_collate(samples)


def _check_range(owner: str, field: str, value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ConfigError(f'{owner}: {field}={value!r} must be a range (low, high)')
    for i, bound in enumerate(value):
        check_number(owner, f'{field}[{i}]', bound)
    if value[0] > value[1]:
        raise ConfigError(f'{owner}: {field}={value!r} must be a range (low, high), low first')


def _orthonormal(number: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """(number, dim): orthonormal rows in random directions."""
    q, r = np.linalg.qr(rng.standard_normal((dim, number)))
    # The signs make the result independent of the convention of the decomposition.
    return (q * np.sign(np.diag(r))).T


def _float32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))
