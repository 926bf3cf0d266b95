"""The gate of a multilinear mixture of experts (arXiv 2402.12550, section 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.items import at_least_float32
from mmdet_moe.moe.precision import KeepsPrecision, no_autocast
from mmdet_moe.ops import entmax15


class _BatchNorm(KeepsPrecision, nn.BatchNorm1d):
    """Its statistics would stand still in half precision."""


NORMS = {
    'bn': lambda size: _BatchNorm(size, affine=False),
    'ln': lambda size: nn.LayerNorm(size, elementwise_affine=False),
}
ACTIVATIONS = {'entmax15': entmax15, 'softmax': lambda logits: F.softmax(logits, dim=-1)}


class ExpertGate(nn.Module):
    """``a = entmax15(Norm(x G))`` for each level of experts, in float32 under any autocast.

    Args:
        in_features: I.
        levels: Experts of each level, N₁, N₂, ….
        norm: ``'bn'`` (over the batch) or ``'ln'`` (over the experts), both without parameters.
        activation: ``'entmax15'`` (most coefficients are exactly 0) or ``'softmax'``.

    Raises:
        ConfigError: For an unknown norm or activation.
    """

    def __init__(
        self, in_features: int, levels: tuple[int, ...], norm: str, activation: str
    ) -> None:
        super().__init__()
        for field, value, known in (('norm', norm, NORMS), ('activation', activation, ACTIVATIONS)):
            if value not in known:
                raise ConfigError(f'{field}={value!r} is unknown; use one of {tuple(known)}')
        self.norm, self.activation = norm, activation
        # All 0: every expert starts with the same coefficient.
        self.weights = nn.ParameterList([torch.zeros(in_features, size) for size in levels])
        self.norms = nn.ModuleList([NORMS[norm](size) for size in levels])

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normalised logits of rows (T, I): (T, N) for each level, at least float32."""
        with no_autocast(x.device.type):
            x = at_least_float32(x)
            # One product for all levels: x is read once, and its gradients need not be added.
            weights = tuple(self.weights)
            joint = torch.cat(weights, dim=1) if len(weights) > 1 else weights[0]
            parts = (x @ joint.to(x.dtype)).split([weight.shape[1] for weight in weights], dim=1)
            return tuple(
                self._normalised(part.contiguous(), norm)  # that of a view takes far longer
                for part, norm in zip(parts, self.norms, strict=True)
            )

    def activate(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The coefficients: non-negative, the sum over each level's experts is 1."""
        return tuple(ACTIVATIONS[self.activation](of_level) for of_level in logits)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of rows (T, I): (T, N) for each level."""
        return self.activate(self.logits(x))

    def _normalised(self, logits: Tensor, norm: nn.Module) -> Tensor:
        mean = getattr(norm, 'running_mean', None)
        if mean is not None and mean.dtype != logits.dtype:
            return norm(logits.to(mean.dtype)).to(logits.dtype)
        return norm(logits)

    def extra_repr(self) -> str:
        return f'norm={self.norm!r}, activation={self.activation!r}'
