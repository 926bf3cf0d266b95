"""Numbers that say how a router behaves. All in nats, all on (…, E) tensors of probabilities."""

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """Entropy ``-sum_i p_i log p_i`` over the last dimension, in nats; ``0 log 0 = 0``."""
    # torch.special.entr has an infinite gradient at 0, where a softmax can underflow to.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def mutual_information(joint: Tensor) -> Tensor:
    """Mutual information of the two variables of a joint table, in nats.

    Args:
        joint: Non-negative counts or probabilities, shape (..., A, B); need not be normalised.

    Returns:
        ``sum_ab p(a, b) log(p(a, b) / (p(a) p(b)))`` of every table, shape (...); 0 for an empty
        table.
    """
    p = shares(joint.double().flatten(-2)).unflatten(-1, joint.shape[-2:])
    return (entropy(p.sum(-2)) + entropy(p.sum(-1)) - entropy(p.flatten(-2))).clamp(min=0)


def conditional_entropy(joint: Tensor) -> Tensor:
    """Entropy ``H(a | b)`` of the first variable of a joint table given the second, in nats.

    Args:
        joint: Non-negative counts or probabilities, shape (..., A, B); need not be normalised.

    Returns:
        ``sum_b p(b) H(a | b)`` of every table, shape (...); 0 for an empty table.
    """
    joint = joint.double()
    given = shares(joint, dim=-2).transpose(-1, -2)
    return (shares(joint.sum(-2)) * entropy(given)).sum(-1)


def shares(counts: Tensor, dim: int = -1) -> Tensor:
    """Counts divided by their sum along a dimension; zeros where nothing was counted."""
    return counts / counts.sum(dim, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


def coefficient_of_variation_squared(x: Tensor) -> Tensor:
    """``Var(x) / mean(x)²`` with the unbiased variance; 0 for one entry."""
    if x.numel() < 2:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
