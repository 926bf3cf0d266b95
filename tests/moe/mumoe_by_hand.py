"""A μMoE as its equations say: with the whole weight tensor, and every step written out."""

import torch
from torch.nn import functional as F

CP = {1: 'ar,ir,or->aio', 2: 'ar,br,ir,or->abio', 3: 'ar,br,cr,ir,or->abcio'}
TR = {
    1: 'pax,xiz,zop->aio',
    2: 'pax,xby,yiz,zop->abio',
    3: 'pax,xby,ycw,wiz,zop->abcio',
}
MIX = {1: 'ta,ti,aio->to', 2: 'ta,tb,ti,abio->to', 3: 'ta,tb,tc,ti,abcio->to'}


def whole(factors):
    """W of the factors, (N₁, N₂, …, I, O)."""
    terms = TR if factors[0].dim() == 3 else CP
    return torch.einsum(terms[len(factors) - 2], *factors)


def mixed(tensor, x, coefficients, bias):
    """``y_o = sum_{n,i} W[n, i, o] a_n x_i``; with a bias a 1 stands behind x."""
    if bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return torch.einsum(MIX[len(coefficients)], *coefficients, x, tensor)


def entmax15(logits):
    """``max(z / 2 - tau, 0) ** 2`` with the sum 1: its support by bisection, tau by that."""
    z = logits / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    with torch.no_grad():
        for _ in range(60):
            middle = (low + high) / 2
            enough = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) >= 1
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        support = z > low
    count = support.sum(-1, keepdim=True).to(z)
    mean = (z * support).sum(-1, keepdim=True) / count
    variance = ((z - mean).square() * support).sum(-1, keepdim=True) / count
    tau = mean - (1 / count - variance).sqrt()
    return torch.where(support, (z - tau).square(), 0)


ACTIVATIONS = {'entmax15': entmax15, 'softmax': lambda logits: F.softmax(logits, -1)}


def gated(gate, x):
    """Coefficients of rows (T, I) for each level."""
    result = []
    for weight, norm in zip(gate.weights, gate.norms, strict=True):
        z = torch.einsum('ti,in->tn', x, weight)
        if gate.norm == 'ln':
            mean, variance = z.mean(1, keepdim=True), z.var(1, unbiased=False, keepdim=True)
        elif gate.training:
            mean, variance = z.mean(0), z.var(0, unbiased=False)
        else:
            mean, variance = norm.running_mean, norm.running_var
        result.append(ACTIVATIONS[gate.activation]((z - mean) / (variance + 1e-5).sqrt()))
    return result


def computed(layer, x):
    """What a layer gives for rows (T, I)."""
    coefficients = gated(layer.gate, x)
    if hasattr(layer, 'hidden'):
        x = F.gelu(mixed(whole([*layer.hidden.factors]), x, coefficients, layer.hidden.bias))
    return mixed(whole([*layer.experts.factors]), x, coefficients, layer.experts.bias)


def randomise(layer):
    """Gates and statistics that are not 0 and 1, of one order of magnitude."""
    for weight in layer.gate.weights:
        torch.nn.init.normal_(weight)
    for norm in layer.gate.norms:
        if layer.gate.norm == 'bn':
            torch.nn.init.normal_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 4.0)
    for factors in [layer.experts, *([layer.hidden] if hasattr(layer, 'hidden') else [])]:
        for factor in factors.factors:
            torch.nn.init.normal_(factor, 0.0, 0.7)
    return layer
