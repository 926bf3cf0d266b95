"""What an MoE layer costs besides its experts: with one expert, and with tiny ones."""

import copy
import statistics
import time
from collections.abc import Sequence
from unittest.mock import patch

import torch
import torchvision
from torch import nn

from mmdet_moe.moe import ConvExperts, MoELayer, add_experts
from research.benchmarks.harness import FORWARD, PASSES, Benchmark, Computation

HARD = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint'}}


class _Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def run_overhead(bench: Benchmark, batch: int) -> None:
    """One expert in the place of a stage, then layers that compute next to nothing."""
    stage = torchvision.models.resnet18().layer3
    _one_expert(
        bench, stage, bench.tensor(batch, 128, 16, 16), f'stage 3 of a ResNet-18, N={batch}'
    )
    maps, tokens = bench.tensor(batch, 16, 4, 4), bench.tensor(batch, 8, 16)
    conv = nn.Conv2d(16, 16, 1)
    for name, layer, x, options in (
        ('convolutions', conv, maps, {}),
        ('convolutions, hard constraint', conv, maps, {'router': HARD}),
        ('modules', nn.Sequential(conv, nn.ReLU()), maps, {}),
        ('linear layers for tokens', nn.Linear(16, 16), tokens, {'granularity': 'token'}),
    ):
        _fixed_cost(bench, name, layer, x, options)
    if bench.device.type == 'cpu':
        levels = [bench.tensor(2, 256, size, size) for size in (32, 16, 8, 4, 2)]
        convs = [nn.Conv2d(256, 256, 3, padding=1) for _ in range(4)]
        conv = ConvExperts(256, 256, 3, 4, padding=1, impl='subbatches')
        for name, experts, maps in (
            ('stage 3 of a ResNet-18', stage, [bench.tensor(batch, 128, 16, 16)]),
            ('subnet of a RetinaNet, 5 levels', nn.Sequential(*convs), levels),
            ('one of its convolutions', conv, levels),
        ):
            _share_of_cat(bench, name, MoELayer(experts, 4, 2, in_channels=maps[0].shape[1]), maps)


def _model(layer: nn.Module, bench: Benchmark, **options) -> nn.Module:
    model = _Holder(copy.deepcopy(layer)).to(bench.device, bench.dtype)
    if options:
        add_experts(model, {'layer': options})
    return model.train()


def _one_expert(bench: Benchmark, stage: nn.Module, x: torch.Tensor, what: str) -> None:
    dense, moe = _model(stage, bench), _model(stage, bench, num_experts=1, top_k=1)
    inputs = {'x': x}
    rows = [
        Computation('dense', lambda: dense(x), inputs),
        Computation('MoE, E = 1', lambda: moe(x), inputs),
    ]
    for pass_ in PASSES:
        expected = rows[0].run(pass_)
        comparison = bench.compare(
            f'one expert, {pass_}; {what}',
            [r.row(pass_, expected) for r in rows],
            baseline='dense',
            watch=[('MoE, E = 1', 'dense')],
        )
        bench.target(
            f'{pass_}: an MoE layer with E = 1 costs at most 3 % more than the dense stage',
            comparison.ratio('MoE, E = 1', 'dense'),
            at_most=1.03,
        )


def _fixed_cost(
    bench: Benchmark, name: str, layer: nn.Module, x: torch.Tensor, options: dict
) -> None:
    """The time that is left when what k dense layers would take is taken away."""
    dense = _model(layer, bench)
    moe = _model(layer, bench, num_experts=4, top_k=2, **options)
    twice = torch.cat([x, x]).detach().requires_grad_()
    rows = [
        Computation('dense, 2 N items', lambda: dense(twice), {'x': twice}),
        Computation('MoE, E = 4, k = 2', lambda: moe(x), {'x': x}),
    ]
    for pass_ in PASSES:
        comparison = bench.compare(
            f'{name}, {pass_}; {tuple(x.shape)}',
            [r.row(pass_) for r in rows],
            watch=[(rows[1].name, rows[0].name)],
        )
        cost = comparison.seconds(rows[1].name) - comparison.seconds(rows[0].name)
        if pass_ == FORWARD:
            bench.target(
                f'{name}: at most 0.3 ms besides the experts, per layer and forward (training)',
                1e3 * cost,
                at_most=0.3,
                unit=' ms',
            )


def _share_of_cat(
    bench: Benchmark, name: str, layer: nn.Module, maps: Sequence[torch.Tensor]
) -> None:
    """The CPU time that the experts' outputs take to be joined for `combine`."""
    layer.to(bench.dtype)
    layer.router.float()
    cat, joining, shares = torch.cat, [], []

    def timed(*args, **kwargs) -> torch.Tensor:
        started = time.process_time()
        joined = cat(*args, **kwargs)
        joining.append(time.process_time() - started)
        return joined

    with patch('torch.cat', timed), torch.no_grad():
        for _ in range(1 + (bench.repeats or 15)):
            joining.clear()
            started = time.process_time()
            layer(maps)
            shares.append(sum(joining) / (time.process_time() - started))
    share = statistics.median(shares[1:])
    bench.note(f'{name}, E = 4, k = 2: joining the outputs is {share:.1%} of the forward pass')
