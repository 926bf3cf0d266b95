"""A router that starts with the clusters of what it is given, instead of with chance."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.distributed import from_first_rank_, is_first_rank
from mmdet_moe.ops.functional import uncompiled

#: Items for each expert before they are clustered.
ITEMS_PER_EXPERT = 64
#: More than these say no more.
MAX_ITEMS = 16384

Normalise = Callable[[Tensor], Tensor]


class KMeansStart(nn.Module):
    """Sets a linear layer so that each expert is chosen for one cluster of the first items.

    The features of the first batches of the training are kept until there are
    :data:`ITEMS_PER_EXPERT` for each expert, then clustered (k-means on standardised features, by
    scikit-learn), once: a resumed run, or one that loads a trained router, does not do it again. On
    several GPUs those of the first one count. What is not finite is left out. They are kept as they
    are and normalised when they are clustered, all of them by the statistics of that moment.

    Args:
        num_experts: E.

    Attributes:
        done: float32 (), 0 until it has been done. No truth value, because averages of weights
            (MMEngine's EMA) leave these as they were in the first iteration.
        waits: Whether it may still have to be done.
        in_pass: Whether several calls make one pass of the model; it is then done before the next
            one, so that all levels of a head count, and none is computed with two routers.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """

    done: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        try:
            import sklearn.cluster  # noqa: F401  # what is missing is said before the training
        except ImportError:
            raise ConfigError(
                "init='kmeans' needs scikit-learn; run pip install scikit-learn"
            ) from None
        self.num_experts = num_experts
        self.register_buffer('done', torch.zeros(()))
        self.waits, self.in_pass = True, False
        self._seen: list[Tensor] = []

    def forward(self, fc: nn.Linear, rows: Tensor, normalise: Normalise) -> None:
        """Look at the items of one training batch, and set the layer once there are enough.

        Only as long as it :attr:`waits`.

        Args:
            fc: From F features to E logits, with a bias.
            rows: (items, F'), at least float32, whatever ``normalise`` takes.
            normalise: Makes the layer's features (items, F) of rows, at the present moment.

        Raises:
            ConfigError: If fewer than E of the items differ.
        """
        uncompiled(self._look)(fc, rows, normalise)

    def set_if_ready(self, fc: nn.Linear, normalise: Normalise) -> None:
        """Set the layer if there are enough items. Called on all ranks alike.

        Raises:
            ConfigError: If fewer than E of the items differ.
        """
        uncompiled(self._set_if_ready)(fc, normalise)

    def forget(self) -> None:
        """Weights have been loaded: whether they are :attr:`done` is asked again."""
        self.waits, self._seen = True, []

    def _still_waits(self) -> bool:
        if self.waits and self.done:  # loaded; not asked for ever, as the answer waits for a GPU
            self.waits, self._seen = False, []
        return self.waits

    @torch.no_grad()
    def _look(self, fc: nn.Linear, rows: Tensor, normalise: Normalise) -> None:
        if not self._still_waits():
            return
        rows = _some(rows.detach()).cpu()
        self._seen.append(rows[rows.isfinite().all(1)])
        if not self.in_pass:
            self._set_if_ready(fc, normalise)

    @torch.no_grad()
    def _set_if_ready(self, fc: nn.Linear, normalise: Normalise) -> None:
        if not self._still_waits():
            return
        enough = ITEMS_PER_EXPERT * self.num_experts
        items = np.empty((0, 0))
        if sum(map(len, self._seen)) >= enough:
            features = normalise(_some(torch.cat(self._seen)).double())
            items = features[features.isfinite().all(1)].numpy()  # the statistics may be NaN
        ready = len(items) >= min(enough, MAX_ITEMS)
        num_different = len(np.unique(items, axis=0)) if ready else 0
        # The first rank's answer, so that all of them go on, or none does.
        told = torch.tensor([ready, len(items), num_different], device=fc.weight.device)
        from_first_rank_([told])
        ready, num_items, num_different = told.tolist()
        if not ready:
            return
        self.waits, self._seen = False, []
        if num_different < self.num_experts:
            raise ConfigError(
                f"init='kmeans': fewer than num_experts={self.num_experts} of the first "
                f"{num_items} items differ; set init='normal'"
            )
        if is_first_rank():
            weight, bias = by_clusters(items, self.num_experts)
            fc.weight.copy_(torch.from_numpy(weight))
            fc.bias.copy_(torch.from_numpy(bias))
        from_first_rank_([fc.weight, fc.bias])
        self.done.fill_(1)


def _some(items: Tensor) -> Tensor:
    """At most :data:`MAX_ITEMS`, at even distances: the first ones may be those of one image."""
    if len(items) <= MAX_ITEMS:
        return items
    return items[torch.arange(MAX_ITEMS, device=items.device) * len(items) // MAX_ITEMS]


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
