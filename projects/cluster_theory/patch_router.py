"""The router of arXiv 2208.02813: linear on every patch, then summed."""

from typing import Any

import torch
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.routers import GAPRouter
from mmdet_moe.registry import MODELS


@MODELS.register_module()
class PatchRouter(GAPRouter):
    """A linear layer of the sum over all positions of an item, whose values may be the gates.

    Args: as :class:`~mmdet_moe.moe.GAPRouter`, and
        gate: What an expert's output is multiplied with. ``'logit'``: the router's own value,
            training noise included, of either sign, as in the program of the paper's authors; the
            weights that balancing and analysis see stay those of its softmax. ``'softmax'``: the
            weight, as in the paper.

    The other defaults are the paper's: no bias, logits of 0 at the start, noise of U[0, 1], and
    the softmax over all experts.

    Raises:
        ConfigError: As :class:`~mmdet_moe.moe.GAPRouter`; for another gate, and for values that
            start at 0 without noise, of which nothing is ever learned.
    """

    needs_maps = True

    def __init__(self, *args: Any, gate: str = 'logit', **kwargs: Any) -> None:
        paper = {'bias': False, 'init_std': 0.0, 'noise': 'uniform', 'softmax': 'over_all'}
        super().__init__(*args, **{**paper, **kwargs})
        if gate not in ('logit', 'softmax'):
            raise ConfigError(f"gate={gate!r} is unknown; use 'logit' or 'softmax'")
        if gate == 'logit' and not self.noise and not self.fc.weight.any():
            raise ConfigError(
                "gate='logit' with init_std=0 and noise=False multiplies all experts with 0, so "
                "that nothing is ever learned; set noise='uniform' or a positive init_std"
            )
        self.gate = gate

    def features(self, x: Tensor, items: Items) -> Tensor:
        if len(items) > 1:
            raise ConfigError("PatchRouter sums over whole images; use granularity='image'")
        return x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    def choose(self, logits: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        expert_ids, weights = super().choose(logits, training)
        if self.gate == 'softmax':
            return expert_ids, weights
        # A weight that is rounded to 0 would mean that there is no choice, and no gate.
        free = torch.ones_like(weights, dtype=torch.bool)
        if self.constraint is not None:
            free = ~torch.isneginf(self.constraint.select(logits, training).gather(1, expert_ids))
        return expert_ids, weights.clamp_min(torch.finfo(weights.dtype).tiny) * free

    def gates(self, logits: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor | None:
        if self.gate == 'softmax':
            return None
        return logits.gather(1, expert_ids).masked_fill(weights == 0, 0)
