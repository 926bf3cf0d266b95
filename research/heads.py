"""Heads on the features of a frozen backbone: their training, and what hangs on each expert."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.analysis.statistics.polysemanticity import of_drops
from mmdet_moe.moe import MoELayer, MuMoE, find_moe_layers
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.losses import BalancingLoss

_ROWS = 2000  # at a time, where nothing is trained
#: How often the images are drawn for the polysemanticity of an expert that knows no class.
_DRAWS = 5


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW, cosine to 0, cross entropy.

    Attributes:
        lr: Of the beginning.
        weight_decay: Decoupled.
        epochs: Passes over the images.
        batch_size: Images in a step.
        dropout: Share of the features that are 0 in a step of training.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 20
    batch_size: int = 512
    dropout: float = 0.0


@dataclass(frozen=True)
class Data:
    """Features (N, F) float32 and labels (N,) int64 of images.

    Attributes:
        weights: (N,) in the loss.
        sources: int64 (N,), the data set that each image comes from.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor | None = None
    sources: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> 'Data':
        parts = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return Data(**{name: None if part is None else part[rows] for name, part in parts})

    def __len__(self) -> int:
        return len(self.labels)


def train_head(
    head: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    balancing: BalancingLoss | None = None,
) -> float:
    """Train a head (N, F) → (N, C).

    Args:
        head: Changed in place.
        data: The training images.
        recipe: How.
        seed: Of the order of the images, and of what is dropped.
        balancing: Of its sparse experts, if it has some.

    Returns:
        The loss, mean over the last epoch.
    """
    torch.manual_seed(seed)
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    steps = len(data) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * recipe.epochs)
    layers = find_moe_layers(head).values() if balancing is not None else ()
    head.train()
    for _ in range(recipe.epochs):
        # What is left over of the images is another part in the next epoch.
        order, total = torch.randperm(len(data)), 0.0
        for step in range(steps):
            batch = data[order[step * recipe.batch_size : (step + 1) * recipe.batch_size]]
            features = F.dropout(batch.features, recipe.dropout)
            losses = F.cross_entropy(head(features), batch.labels, reduction='none')
            loss = (losses if batch.weights is None else losses * batch.weights).mean()
            total += float(loss.detach())
            for layer in layers:
                if batch.sources is not None:
                    layer.routing.sources = tuple(batch.sources.tolist())
                loss = loss + balancing(layer.routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    head.eval()
    return total / steps


@torch.no_grad()
def predict(head: nn.Module, features: Tensor) -> Tensor:
    """Logits (N, C) of a head."""
    head.eval()
    return torch.cat([head(part) for part in features.split(_ROWS)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In 0..1."""
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def without_each(head: MuMoE | MoELayer, features: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What a head says with the contribution of one expert zeroed, for each expert.

    The weights of the others stay as they are.

    Args:
        head: The layer of experts.
        features: (N, F).

    Yields:
        The expert, the images (n,) that it contributes to, and their logits (n, C) without it.
    """
    head.eval()
    if isinstance(head, MuMoE):
        levels = head.coefficients(features)
        place = np.indices(head.levels).reshape(len(head.levels), -1)
        for expert in range(head.num_experts):
            own = [a[:, n] for a, n in zip(levels, place[:, expert], strict=True)]
            rows = torch.stack(own).ne(0).all(0).nonzero()[:, 0]
            of_rows = [a[rows] for a in levels]
            yield expert, rows, head.mix_without(features[rows], of_rows, expert)
        return
    head(features)
    ids, weights = head.routing.expert_ids, head.routing.weights
    for expert in range(head.num_experts):
        rows = (ids == expert).any(1).nonzero()[:, 0]
        kept = weights[rows] * (ids[rows] != expert)
        dispatcher = Dispatcher(ids[rows], kept, head.num_experts)
        yield expert, rows, head.run_experts(features[rows], dispatcher) if len(rows) else kept[:0]


def look_at_experts(head: MuMoE | MoELayer, data: Data, seed: int) -> dict:
    """Zero each expert, and compare the classes that it hits with chance.

    Args:
        head: The layer of experts.
        data: Test images.
        seed: Of the draws.

    Returns:
        ``values``: the polysemanticity of each expert (None if no class falls). ``by_chance``: that
        of an expert that knows no class: as many images lost and won as the expert's, drawn from
        those that were right and wrong. ``lost``, ``won``: images that become wrong and right
        without it; ``items``: that it contributes to at all, of ``num_images``.
    """
    labels = data.labels.numpy()
    right = (predict(head, data.features).argmax(1) == data.labels).numpy()
    counts = np.bincount(labels)
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {k: [] for k in ('values', 'by_chance', 'lost', 'won', 'items')}

    def drops(lost: np.ndarray, won: np.ndarray) -> np.ndarray:
        change = np.bincount(labels[lost], minlength=len(counts)).astype(float)
        return (change - np.bincount(labels[won], minlength=len(counts))) / counts

    for _, rows, logits in without_each(head, data.features):
        rows = rows.numpy()
        now = logits.argmax(1).numpy() == labels[rows]
        lost, won = rows[right[rows] & ~now], rows[~right[rows] & now]
        chance = [
            of_drops(
                drops(
                    rng.choice(np.flatnonzero(right), len(lost), replace=False),
                    rng.choice(np.flatnonzero(~right), len(won), replace=False),
                )
            )
            for _ in range(_DRAWS)
        ]
        known = [value for value in chance if value is not None]
        found['values'].append(of_drops(drops(lost, won)))
        found['by_chance'].append(float(np.mean(known)) if known else None)
        for key, rows_of in (('lost', lost), ('won', won), ('items', rows)):
            found[key].append(len(rows_of))
    return {'num_images': len(labels), **found}
