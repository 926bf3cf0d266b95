"""Convolutions as experts: against other ways and dense ones, with many experts, and ``auto``."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.experts.conv import ConvExperts
from mmdet_moe.moe.experts.conv_cost import cheapest
from mmdet_moe.moe.experts.modules import ModuleExperts
from research.benchmarks.harness import (
    PASSES,
    TRAINING,
    Alternative,
    Benchmark,
    Comparison,
    Computation,
    Inputs,
)

IMPLS = ('subbatches', 'grouped', 'views')


@dataclass(frozen=True)
class ConvShape:
    """N images (C, H, H), each convolved by k of E convolutions C → C."""

    n: int
    c: int
    h: int
    e: int
    k: int = 2
    kernel: int = 3

    def __str__(self) -> str:
        size = f'{self.n}×{self.c}×{self.h}×{self.h}'
        return f'{size}, {self.kernel}×{self.kernel}, E={self.e}, k={self.k}'

    @property
    def active_flops(self) -> int:
        """Of the chosen convolutions, forward."""
        return 2 * self.n * self.k * self.c**2 * self.kernel**2 * self.h**2


class ConvProblem:
    """A batch with its routing and the kernels, and ways to compute the mixture of convolutions.

    Args:
        bench: Says where.
        shape: Says what.
        balanced: Whether every expert gets n·k / e images, instead of random ones.
    """

    def __init__(self, bench: Benchmark, shape: ConvShape, balanced: bool = False) -> None:
        self.shape = shape
        self.x = bench.tensor(shape.n, shape.c, shape.h, shape.h)
        fan_in = shape.c * shape.kernel**2
        kernels = torch.randn(shape.e, shape.c, shape.c, shape.kernel, shape.kernel)
        self.kernels = (kernels / math.sqrt(fan_in)).to(bench.device, bench.dtype).requires_grad_()
        self.ids, self.weights = bench.routing(shape.n, shape.e, shape.k)
        if balanced:
            self.ids = _balanced_ids(shape).to(bench.device)

    @property
    def inputs(self) -> Inputs:
        """What gets gradients."""
        return {'x': self.x, 'kernels': self.kernels, 'weights': self.weights}

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """One expert on some images."""
        return F.conv2d(x, kernel, padding=self.shape.kernel // 2)

    def all_experts(self) -> Tensor:
        """Every expert on every image."""
        shape = self.shape
        mixture = self.weights.new_zeros(shape.n, shape.e).scatter(1, self.ids, self.weights)
        return sum(
            self.convolve(self.x, self.kernels[e]) * mixture[:, e, None, None, None]
            for e in range(shape.e)
        )

    def masked_loop(self) -> Tensor:
        """As the code of arXiv 2204.10598 does it."""
        out = torch.zeros_like(self.x)
        for e in range(self.shape.e):
            chosen = self.ids == e
            mask = chosen.any(dim=1)
            if mask.any():
                y = self.convolve(self.x[mask], self.kernels[e])
                out[mask] += self.weights[chosen][:, None, None, None] * y
        return out

    def index_add(self) -> Tensor:
        """Sorted sub-batches without any op of ours."""
        shape, flat = self.shape, self.ids.flatten()
        order = flat.argsort(stable=True)
        images = torch.div(order, shape.k, rounding_mode='floor')
        counts = flat.bincount(minlength=shape.e).tolist()
        rows = self.x.index_select(0, images).split(counts)
        results = [self.convolve(r, k) for r, k in zip(rows, self.kernels, strict=True) if len(r)]
        y = torch.cat(results) * self.weights.flatten()[order][:, None, None, None]
        return torch.zeros_like(self.x).index_add_(0, images, y)

    def stacked(self, impl: str, name: str = '') -> Computation:
        """Ours: from the router's decision to the output, with the sorting."""
        experts = self._conv_experts(impl)
        return Computation(
            name or f'ConvExperts {impl!r}',
            lambda: experts(self.x, Dispatcher(self.ids, self.weights, self.shape.e)),
            {**self.inputs, 'kernels': experts.weight},
        )

    def modules(self, name: str) -> Computation:
        """Ours, with experts that are a list of ``nn.Conv2d``."""
        shape = self.shape
        convs = [
            nn.Conv2d(shape.c, shape.c, shape.kernel, padding='same', bias=False, device='meta')
            for _ in range(shape.e)
        ]
        for conv, kernel in zip(convs, self.kernels.detach(), strict=True):
            conv.weight = nn.Parameter(kernel.clone())
        experts = ModuleExperts(convs)
        return Computation(
            name,
            lambda: experts(self.x, Dispatcher(self.ids, self.weights, shape.e)),
            {**self.inputs, 'kernels': [conv.weight for conv in convs]},
        )

    def choice(self, pass_: str) -> str:
        """What ``impl='auto'`` stands for."""
        with torch.set_grad_enabled(pass_ == TRAINING):
            dispatcher = Dispatcher(self.ids, self.weights, self.shape.e)
            return cheapest(self._conv_experts('auto'), self.x, dispatcher)

    def _conv_experts(self, impl: str) -> ConvExperts:
        shape = self.shape
        with torch.device('meta'):  # no need to draw weights
            experts = ConvExperts(
                shape.c, shape.c, shape.kernel, shape.e, padding='same', bias=False, impl=impl
            )
        experts.weight = nn.Parameter(self.kernels.detach())
        return experts


def run_conv(bench: Benchmark, shapes: Sequence[ConvShape]) -> None:
    """ConvExperts against other ways to the same result, and against dense convolutions."""
    for pass_ in PASSES:
        measured = {str(shape): _compare_conv(bench, shape, pass_) for shape in shapes}
        to_dense = {s: c.ratio("ConvExperts 'auto'", c.baseline) for s, c in measured.items()}
        to_loop = {s: c.ratio('masked loop', "ConvExperts 'auto'") for s, c in measured.items()}
        worst, least = max(to_dense, key=to_dense.get), min(to_loop, key=to_loop.get)
        bench.target(
            f'{pass_}: auto at most 1.10x of a convolution of the same active FLOPs, each shape',
            to_dense[worst],
            at_most=1.10,
            detail=worst,
        )
        bench.target(
            f'{pass_}: auto at most 0.85x of it in at least two shapes',
            sum(ratio <= 0.85 for ratio in to_dense.values()),
            at_least=2,
            unit=f' of {len(to_dense)}',
        )
        bench.target(
            f'{pass_}: auto at least 2x faster than the masked loop, each shape',
            to_loop[least],
            at_least=2,
            detail=least,
        )


def _compare_conv(bench: Benchmark, shape: ConvShape, pass_: str) -> Comparison:
    problem = ConvProblem(bench, shape)
    same = [
        Computation('all experts', problem.all_experts, problem.inputs),
        Computation('masked loop', problem.masked_loop, problem.inputs),
        Computation('index_select + index_add_', problem.index_add, problem.inputs),
        *(problem.stacked(impl) for impl in IMPLS),
    ]
    expected = same[0].run(pass_)
    auto = problem.stacked('auto').row(pass_, expected, note=problem.choice(pass_))

    def dense(name: str, num_images: int) -> Alternative:
        x = bench.tensor(num_images, shape.c, shape.h, shape.h)
        kernel = problem.kernels[0].detach().requires_grad_()
        one = Computation(name, lambda: problem.convolve(x, kernel), {'x': x, 'kernel': kernel})
        return one.row(pass_)

    baseline = 'one convolution, N·k images'
    rows = [*(c.row(pass_, expected) for c in same), auto, dense(baseline, shape.n * shape.k)]
    rows.append(dense('one convolution, N images', shape.n))
    watch = [(auto.name, baseline), (auto.name, 'masked loop')]
    return bench.compare(f'{shape}; {pass_}', rows, baseline=baseline, watch=watch)


def run_scaling(bench: Benchmark, shapes: Sequence[ConvShape]) -> None:
    """The same batch with more and more experts, all of which get as many images."""
    problems = {f'E={shape.e}': ConvProblem(bench, shape, balanced=True) for shape in shapes}
    first, last = f'E={shapes[0].e}', f'E={shapes[-1].e}'
    for pass_ in PASSES:
        stacked = {name: p.stacked('auto', name) for name, p in problems.items()}
        modules = {name: p.modules(name) for name, p in problems.items()}
        # Each kind has to match the other one.
        kinds = {
            "ConvExperts 'auto'": [
                c.row(pass_, modules[name].run(pass_), note=problems[name].choice(pass_))
                for name, c in stacked.items()
            ],
            'ModuleExperts': [
                c.row(pass_, stacked[name].run(pass_)) for name, c in modules.items()
            ],
        }
        for kind, rows in kinds.items():
            title = f'{kind}; {shapes[0]} and more; {pass_}'
            comparison = bench.compare(title, rows, baseline=first, watch=[(last, first)])
            bench.target(
                f'{kind}, {pass_}: {last} at most 1.15x of {first}',
                comparison.ratio(last, first),
                at_most=1.15,
            )


def _balanced_ids(shape: ConvShape) -> Tensor:
    """(n, 2) ids: every expert equally often, with varying partners, in random order."""
    item = torch.arange(shape.n)
    first = item % shape.e
    second = (first + 1 + item // shape.e % (shape.e - 1)) % shape.e
    return torch.stack([first, second], dim=1)[torch.randperm(shape.n)]


def run_auto(bench: Benchmark, num_shapes: int) -> None:
    """All ways of ConvExperts on a sample of shapes, and what auto makes of them."""
    grid = list(_grid())
    shapes = random.Random(0).sample(grid, min(num_shapes, len(grid)))
    bench.note(f'{len(shapes)} of {len(grid)} shapes; median ms of each way')
    for pass_ in PASSES:
        slower = []
        for shape in shapes:
            problem = ConvProblem(bench, shape)
            ways = [problem.stacked(impl, impl) for impl in IMPLS]
            choice, expected = problem.choice(pass_), ways[0].run(pass_)
            rows = [w.row(pass_, expected, note='auto' * (w.name == choice)) for w in ways]
            comparison = bench.compare(f'{shape}; {pass_}', rows, show=False)
            fastest = min(IMPLS, key=comparison.seconds)
            slower.append(1.0 if choice == fastest else max(1.0, comparison.ratio(choice, fastest)))
            times = ', '.join(f'{impl} {1e3 * comparison.seconds(impl):.3f}' for impl in IMPLS)
            bench.note(f'{shape}; {pass_}: {times}; auto: {choice}, {slower[-1]:.2f}x')
        mean = math.exp(sum(map(math.log, slower)) / len(slower))
        bench.note(
            f'{pass_}: auto takes the fastest way in {slower.count(1.0)} of {len(slower)} cases, '
            f'and {mean:.3f}x of its time in geometric mean, {max(slower):.2f}x at worst'
        )


def _grid() -> Iterator[ConvShape]:
    """From hardly any work to a second of it."""
    for n, c, h, k, kernel in itertools.product(
        (2, 8, 32, 64), (32, 64, 128, 256), (4, 8, 16, 32, 64), (1, 2, 4), (1, 3)
    ):
        shape = ConvShape(n, c, h, 8, k, kernel)
        if 1e6 <= shape.active_flops <= 2e10:
            yield shape
