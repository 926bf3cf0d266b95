"""Gradient descent whose steps have a fixed length."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class NormalizedGD(Optimizer):
    """``w ← w − lr · (g / ‖g‖ + weight_decay · w)``, ‖g‖ the norm of all gradients of a group.

    So an expert that gets few samples moves as far as one that gets many (arXiv 2208.02813). A
    gradient of 0 stays 0. :class:`~mmdet_moe.engine.optimizers.ExpertGroupsConstructor` makes the
    groups.

    Args:
        params: Parameters, or groups of them, which may have options of their own.
        lr: Length of a step without weight decay.
        weight_decay: As above: it is not part of what is normalised.
        normalize: False: ``‖g‖`` is replaced by 1, which is plain gradient descent.
        stacked: Each slice along the first axis of the parameters, which they must have in common,
            is normalised by itself: experts with stacked weights.

    Raises:
        ConfigError: For negative numbers, and for stacked parameters of different lengths.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float = 0.0,
        normalize: bool = True,
        stacked: bool = False,
    ) -> None:
        defaults = {
            'lr': lr,
            'weight_decay': weight_decay,
            'normalize': normalize,
            'stacked': stacked,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for field in ('lr', 'weight_decay'):
                if group[field] < 0:
                    raise ConfigError(f'NormalizedGD: {field}={group[field]} must not be negative')
            lengths = {p.shape[0] if p.dim() else None for p in group['params']}
            if group['stacked'] and (len(lengths) != 1 or None in lengths):
                raise ConfigError(
                    'NormalizedGD: stacked=True needs parameters with the same length along the '
                    f'first axis, got {sorted(map(str, lengths))}; give them groups of their own'
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group['params'] if p.grad is not None]
            if not parameters:
                continue
            factor = _inverse_norm(parameters, group['stacked']) if group['normalize'] else None
            for p in parameters:
                step = p.grad
                if factor is not None:
                    step = step * factor.view(-1, *(1,) * (p.dim() - 1)).to(step)
                if group['weight_decay']:
                    step = step.add(p, alpha=group['weight_decay'])
                p.add_(step, alpha=-group['lr'])
        return loss


def _inverse_norm(parameters: list[Tensor], stacked: bool) -> Tensor:
    """One over the norm of the gradients, 0 where they are 0: (1,), or (E,) by slice."""
    rows = [p.grad.float().reshape(len(p.grad) if stacked else 1, -1) for p in parameters]
    norm = torch.linalg.vector_norm(torch.cat(rows, dim=1), dim=1)
    return torch.where(norm == 0, 0, 1 / norm)
