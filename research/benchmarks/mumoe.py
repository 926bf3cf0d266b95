"""Multilinear layers: against linear ones, and against their formula written down."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_moe.moe import CPMuMoE, MuMoE, TRMuMoE
from mmdet_moe.ops import entmax15
from research.benchmarks.harness import FORWARD, PASSES, TRAINING, Benchmark, Computation

LINEAR, CP, TR = 'nn.Linear', 'CPMuMoE', 'TRMuMoE'


@dataclass(frozen=True)
class MuMoEShape:
    """Tokens (B, T, C) into layers C → C.

    Attributes:
        batch: B.
        tokens: T.
        features: C.
        experts: E.
        level: Experts of each level, where one level is compared with two.
    """

    batch: int
    tokens: int
    features: int
    experts: int
    level: int


def run_mumoe(bench: Benchmark, shape: MuMoEShape) -> None:
    """entmax15 alone, layers of as many parameters as the linear one, two levels of experts."""
    _entmax15(bench, shape)
    _layers(bench, shape)
    _levels(bench, shape)


def _entmax15(bench: Benchmark, shape: MuMoEShape) -> None:
    from entmax import entmax15 as by_sort

    x = bench.tensor(shape.batch * shape.tokens, shape.experts)
    ours = Computation('ours', lambda: entmax15(x), {'x': x})
    package = Computation('package entmax', lambda: by_sort(x, dim=-1), {'x': x})
    # In half precision, the package's own results are the inexact ones.
    wide = Computation('in float64', lambda: by_sort(x.double(), dim=-1).to(x.dtype), {'x': x})
    for pass_ in PASSES:
        expected = wide.run(pass_)
        rows = [ours.row(pass_, expected), package.row(pass_)]
        title = f'entmax15, {pass_}; {" × ".join(map(str, x.shape))}'
        watch = [(ours.name, package.name)]
        comparison = bench.compare(title, rows, baseline=ours.name, watch=watch)
        if pass_ == TRAINING:
            bench.target(
                'entmax15: at least 8x faster than the package',
                comparison.ratio(package.name, ours.name),
                at_least=8,
            )


def _layers(bench: Benchmark, shape: MuMoEShape) -> None:
    x = bench.tensor(shape.batch, shape.tokens, shape.features)
    linear = nn.Linear(shape.features, shape.features).to(bench.device, bench.dtype)
    rows = [
        Computation(LINEAR, lambda: linear(x), {'x': x} | dict(linear.named_parameters())),
    ]
    written: dict[str, str] = {}
    for name, kind, formula in ((CP, CPMuMoE, cp_formula), (TR, TRMuMoE, tr_formula)):
        layer = _layer(bench, kind(shape.features, shape.features, shape.experts, 'match'))
        inputs = {'x': x} | dict(layer.named_parameters())
        written[name] = f'{name} as its formula'
        rows += [
            Computation(name, lambda layer=layer: layer(x), inputs),
            Computation(written[name], lambda f=formula, m=layer: _by_formula(m, f, x), inputs),
        ]
    what = f'{tuple(x.shape)}, {shape.features} → {shape.features}, E={shape.experts}'
    for pass_ in PASSES:
        expected = {row.name: row.run(pass_) for row in rows if row.name in written.values()}
        comparison = bench.compare(
            f'layers of as many parameters, {pass_}; {what}',
            [row.row(pass_, expected.get(written.get(row.name))) for row in rows],
            baseline=LINEAR,
            watch=[(n, other) for n, by_hand in written.items() for other in (LINEAR, by_hand)],
        )
        if pass_ == FORWARD:
            continue
        for name, most in ((CP, 1.5), (TR, 3.0)):
            bench.target(
                f'{name}: a step takes at most {most:g}x that of nn.Linear',
                comparison.ratio(name, LINEAR),
                at_most=most,
            )
            bench.target(
                f'{name}: at least 2.5x faster than its formula with the package entmax',
                comparison.ratio(written[name], name),
                at_least=2.5,
            )


def _levels(bench: Benchmark, shape: MuMoEShape) -> None:
    x = bench.tensor(shape.batch, shape.tokens, shape.features)
    one = _layer(bench, CPMuMoE(shape.features, shape.features, shape.level, 'match'))
    rank = one.experts.factors[0].shape[1]
    two = _layer(bench, CPMuMoE(shape.features, shape.features, (shape.level,) * 2, rank))
    names = [f'{shape.level} experts', f'{shape.level**2} experts, two levels']
    rows = [
        Computation(name, lambda layer=layer: layer(x), {'x': x} | dict(layer.named_parameters()))
        for name, layer in zip(names, (one, two), strict=True)
    ]
    for pass_ in PASSES:
        comparison = bench.compare(
            f'levels of experts, {pass_}; {tuple(x.shape)}, rank {rank}',
            [row.row(pass_) for row in rows],
            baseline=names[0],
            watch=[(names[1], names[0])],
        )
        if pass_ == TRAINING:
            bench.target(
                f'{CP}: {names[1]}, take at most 1.3x the step of {names[0]}',
                comparison.ratio(names[1], names[0]),
                at_most=1.3,
            )


def _layer(bench: Benchmark, layer: MuMoE) -> MuMoE:
    """In training mode, with a gate that has left its zeros: entmax15 of ties is another thing."""
    for weight in layer.gate.weights:
        nn.init.normal_(weight)
    return layer.to(bench.device, bench.dtype)


Formula = Callable[[MuMoE, Tensor, Tensor], Tensor]


def _by_formula(layer: MuMoE, formula: Formula, x: Tensor) -> Tensor:
    """A layer of one level as one would write it: a = entmax15(BN(x G)), 1 appended to x."""
    from entmax import entmax15 as by_sort

    rows = x.flatten(0, -2)
    logits = torch.einsum('ti,in->tn', rows.float(), layer.gate.weights[0].float())
    a = by_sort(layer.gate.norms[0].float()(logits), dim=-1).to(x.dtype)
    extended = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return formula(layer, extended, a).unflatten(0, x.shape[:-1])


def cp_formula(layer: MuMoE, x: Tensor, a: Tensor) -> Tensor:
    """``y = Z ((Uᵀa) * (Vᵀx))`` (arXiv 2402.12550, equation 2)."""
    u, v, z = layer.experts.factors
    return torch.einsum(
        'tr,or->to', torch.einsum('tn,nr->tr', a, u) * torch.einsum('ti,ir->tr', x, v), z
    )


def tr_formula(layer: MuMoE, x: Tensor, a: Tensor) -> Tensor:
    """The ring, core after core (arXiv 2402.12550, equation 4)."""
    experts, inputs, outputs = layer.experts.factors
    ring = torch.einsum(
        'tpq,tqr->tpr',
        torch.einsum('tn,pnq->tpq', a, experts),
        torch.einsum('ti,qir->tqr', x, inputs),
    )
    return torch.einsum('tpr,rop->to', ring, outputs)
