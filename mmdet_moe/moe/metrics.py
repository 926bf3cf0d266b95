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
        joint: Non-negative counts or probabilities, shape (A, B); need not be normalised.

    Returns:
        Scalar ``sum_ab p(a, b) log(p(a, b) / (p(a) p(b)))``; 0 for an empty table.
    """
    p = joint.double() / joint.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p.flatten())).clamp(min=0)


def coefficient_of_variation_squared(x: Tensor) -> Tensor:
    """``Var(x) / mean(x)²`` with the unbiased variance; 0 for one entry."""
    if x.numel() < 2:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
