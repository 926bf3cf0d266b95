"""A router that starts with the clusters of what it is given, instead of with chance."""

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.distributed import from_first_rank_

#: Items for each expert before they are clustered.
ITEMS_PER_EXPERT = 64
#: More than these say no more.
MAX_ITEMS = 16384


class KMeansStart(nn.Module):
    """Sets a linear layer so that each expert is chosen for one cluster of the first items.

    The features of the first batches of the training are kept until there are
    :data:`ITEMS_PER_EXPERT` for each expert, then clustered (k-means on standardised features, by
    scikit-learn), once: a resumed run, or one that loads a trained router, does not do it again. On
    several GPUs those of the first one count.

    Args:
        num_experts: E.

    Attributes:
        done: bool (), whether it has been done.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        try:
            import sklearn.cluster  # noqa: F401  # what is missing is said before the training
        except ImportError:
            raise ConfigError(
                "init='kmeans' needs scikit-learn; run pip install scikit-learn"
            ) from None
        self.num_experts = num_experts
        self.register_buffer('done', torch.zeros((), dtype=torch.bool))
        self._waits = True
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def forward(self, fc: nn.Linear, features: Tensor) -> None:
        """Look at the items of one training batch, and set the layer once there are enough.

        Args:
            fc: From F features to E logits, with a bias.
            features: (items, F).

        Raises:
            ConfigError: If fewer than E of the items differ.
        """
        if not self._waits:
            return
        if self.done:  # loaded; asked once, as the answer waits for a GPU
            self._waits = False
            return
        self._seen.append(features.detach()[:MAX_ITEMS].double().cpu())
        enough = ITEMS_PER_EXPERT * self.num_experts
        ready = fc.weight.new_tensor(float(sum(map(len, self._seen)) >= enough))
        from_first_rank_([ready])
        if not ready:
            return
        items = torch.cat(self._seen)[:MAX_ITEMS].numpy()
        self._waits, self._seen = False, []
        if len(np.unique(items, axis=0)) < self.num_experts:
            raise ConfigError(
                f"init='kmeans': fewer than num_experts={self.num_experts} of the first "
                f"{len(items)} items differ; set init='normal'"
            )
        weight, bias = by_clusters(items, self.num_experts)
        fc.weight.copy_(torch.from_numpy(weight))
        fc.bias.copy_(torch.from_numpy(bias))
        from_first_rank_([fc.weight, fc.bias])
        self.done.fill_(True)


def by_clusters(items: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The linear layer that is largest for the nearest of the items' cluster centres.

    With z the standardised features and c a centre, ``−|z − c|²`` is linear in z but for ``|z|²``,
    which is the same for all. Scaled so that the nearest centre leads by 1 on average.

    Args:
        items: float64 (T, F), of which at least ``num_clusters`` differ.
        num_clusters: E.

    Returns:
        float64 weight (E, F) and bias (E,).
    """
    from sklearn.cluster import KMeans

    mean, std = items.mean(0), items.std(0)
    std[std == 0] = 1
    seed = torch.initial_seed() % 2**32
    clusters = KMeans(num_clusters, n_init=10, random_state=seed).fit((items - mean) / std)
    centres = clusters.cluster_centers_
    weight = 2 * centres / std
    bias = -(centres**2).sum(1) - weight @ mean
    if num_clusters > 1:
        best = np.sort(items @ weight.T + bias, axis=1)
        lead = (best[:, -1] - best[:, -2]).mean()
        weight, bias = weight / lead, bias / lead
    return weight, bias
