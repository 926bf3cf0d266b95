"""Timing alternatives against one another, on machines that are not quiet.

All alternatives of a comparison live in one process. Before anything is timed, those that claim to
compute the same are compared with the expected results. Then they take turns, round after round, so
that whatever else the machine does hits all of them alike; a ratio is the median over the rounds of
two times that were taken right after one another.
"""

import gc
import statistics
import sys
import timeit
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmdet_moe.moe.layout import memory_format_of

FORWARD, TRAINING = 'forward', 'forward + backward'
PASSES = (FORWARD, TRAINING)

#: Largest difference from the expected result, relative to the largest expected value.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: PyTorch lets cuDNN's convolutions of float32 round to TF32, whose mantissa has 10 bits.
TF32_TOLERANCE = 1e-2
WARM_UP_ROUNDS = 2
#: Without --repeats: as many rounds as fit into the time, within the bounds.
SECONDS_PER_COMPARISON = 15.0
FEWEST_ROUNDS, MOST_ROUNDS = 7, 50
#: A GPU is kept busy for as long, so that waiting for its last kernel does not count.
SECONDS_PER_GPU_SAMPLE = 1e-2
#: Each may take other inputs, so that none finds its own in the cache.
CALLS_PER_GRAPH = 6

Results = dict[str, Tensor | list[Tensor]]
Inputs = dict[str, Tensor | list[Tensor]]


class WrongResult(Exception):
    """An alternative does not compute what it claims to."""


@dataclass(frozen=True)
class Alternative:
    """One row of a comparison.

    Attributes:
        name: How the tables call it.
        run: One timed call; what it returns is compared with ``expected``.
        expected: The right results; None if it is a limit or a baseline that computes other things.
        num_bytes: Bytes that have to be read and written, at least.
        note: Printed behind its figures.
    """

    name: str
    run: Callable[[], Results | None]
    expected: Results | None = None
    num_bytes: int | None = None
    note: str = ''


@dataclass(frozen=True)
class Computation:
    """A function of tensors, timed forward or forward + backward.

    Attributes:
        name: How the tables call it.
        function: Computes one or several outputs.
        inputs: Tensors that the backward pass computes gradients for; a list counts as one stacked
            tensor (the kernels of a list of modules).
    """

    name: str
    function: Callable[[], Tensor | Sequence[Tensor]]
    inputs: Inputs = field(default_factory=dict)

    def run(self, pass_: str) -> Results:
        """The outputs, with their gradients if ``pass_`` is :data:`TRAINING`."""
        if pass_ == FORWARD:
            with torch.no_grad():
                return _named_outputs(self.function())
        outputs = _named_outputs(self.function())
        lists = [[v] if isinstance(v, Tensor) else v for v in self.inputs.values()]
        gradients = iter(
            torch.autograd.grad(
                list(outputs.values()),
                [tensor for tensors in lists for tensor in tensors],
                [
                    _cotangent(y.shape, y.dtype, y.device, memory_format_of(y))
                    for y in outputs.values()
                ],
                materialize_grads=True,
            )
        )
        results: Results = {name: y.detach() for name, y in outputs.items()}
        for (name, value), tensors in zip(self.inputs.items(), lists, strict=True):
            taken = [next(gradients) for _ in tensors]
            results[f'gradient of {name}'] = taken[0] if isinstance(value, Tensor) else taken
        return results

    def row(
        self,
        pass_: str,
        expected: Results | None = None,
        num_bytes: int | None = None,
        note: str = '',
    ) -> Alternative:
        """This computation as a row of a comparison."""
        return Alternative(self.name, lambda: self.run(pass_), expected, num_bytes, note)


def _named_outputs(outputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {'output': outputs}
    return {f'output {i}': output for i, output in enumerate(outputs)}


@lru_cache(maxsize=16)
def _cotangent(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Tensor:
    """The same gradient of an output for all alternatives."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(device, dtype)
    return values.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        title: What was compared.
        samples: Seconds of every round by the name of the alternative.
        baseline: The alternative that ratios refer to, if that makes sense.
        limit: The alternative whose bandwidth is 100 %.
        num_bytes: Bytes moved by each alternative that knows them.
        notes: Notes by name.
        watch: Names of which the first one's time relative to the second one's is what
            ``--compare`` follows.
    """

    title: str
    samples: dict[str, list[float]]
    baseline: str | None = None
    limit: str | None = None
    num_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    watch: Sequence[tuple[str, str]] = ()

    def seconds(self, name: str) -> float:
        """Median."""
        return statistics.median(self.samples[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """First and third quartile."""
        return tuple(np.percentile(self.samples[name], (25, 75)).tolist())

    def ratio(self, name: str, other: str) -> float:
        """How many times the time of ``other`` it takes: median over the rounds."""
        pairs = zip(self.samples[name], self.samples[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def bandwidth(self, name: str) -> float:
        """GB/s."""
        return self.num_bytes[name] / self.seconds(name) / 1e9

    def share(self, name: str, limit: str) -> float:
        """Bandwidth relative to that of another alternative."""
        return self.num_bytes[name] / self.num_bytes[limit] / self.ratio(name, limit)

    def table(self) -> Table:
        """One line per alternative."""
        table = Table()
        table.add_column('alternative')
        for column in ('median ms', 'quartiles ms'):
            table.add_column(column, justify='right')
        if self.baseline:
            table.add_column(f'× {self.baseline}', justify='right')
        if self.limit:
            table.add_column('GB/s', justify='right')
            table.add_column(f'% of {self.limit}', justify='right')
        if has_notes := any(self.notes.values()):
            table.add_column('')
        for name in self.samples:
            first, third = self.quartiles(name)
            cells = [name, _ms(self.seconds(name)), f'{_ms(first)} – {_ms(third)}']
            if self.baseline:
                cells.append(f'{self.ratio(name, self.baseline):.2f}')
            if self.limit and name in self.num_bytes:
                cells.append(f'{self.bandwidth(name):.1f}')
                cells.append(f'{100 * self.share(name, self.limit):.0f}')
            elif self.limit:
                cells += ['', '']
            if has_notes:
                cells.append(self.notes[name])
            table.add_row(*cells)
        return table

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = []
        for name, samples in self.samples.items():
            row: dict[str, Any] = {
                'name': name,
                'median_ms': 1e3 * self.seconds(name),
                'quartiles_ms': [1e3 * q for q in self.quartiles(name)],
                'samples_ms': [round(1e3 * s, 6) for s in samples],
            }
            if self.baseline:
                row['ratio'] = self.ratio(name, self.baseline)
            if name in self.num_bytes:
                row['bytes'] = self.num_bytes[name]
                row['gb_per_s'] = self.bandwidth(name)
            if self.limit and name in self.num_bytes:
                row['share_of_limit'] = self.share(name, self.limit)
            if self.notes.get(name):
                row['note'] = self.notes[name]
            rows.append(row)
        return {
            'title': self.title,
            'baseline': self.baseline,
            'limit': self.limit,
            'watch': self.watch,
            'rows': rows,
        }


def _ms(seconds: float) -> str:
    return f'{1e3 * seconds:.3f}' if seconds < 1e-2 else f'{1e3 * seconds:.1f}'


class Benchmark:
    """Runs comparisons, prints them, and keeps them for the JSON file.

    Args:
        device: Where tensors live.
        dtype: Of tensors.
        repeats: Rounds of every comparison; by default as many as fit into ``seconds``.
        seconds: Of every comparison.
        only_watched: Whether to time nothing but the alternatives that are watched, in silence.
        channels_last: Whether feature maps have that memory format.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        repeats: int | None = None,
        seconds: float = SECONDS_PER_COMPARISON,
        only_watched: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.device, self.dtype, self.repeats = device, dtype, repeats
        self.channels_last = channels_last
        self.seconds, self.only_watched = seconds, only_watched
        # A pipe has no width.
        width = None if sys.stdout.isatty() else 150
        self.console = Console(width=width, highlight=False, quiet=only_watched)
        self.suites: dict[str, dict[str, list]] = {}

    def tensor(self, *shape: int) -> Tensor:
        """Normal values with a gradient."""
        values = torch.randn(shape).to(self.device, self.dtype)
        if self.channels_last and len(shape) == 4:
            values = values.to(memory_format=torch.channels_last)
        return values.requires_grad_()

    def routing(self, num_items: int, num_experts: int, k: int) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, (T, k), as of a router that knows nothing."""
        logits, ids = torch.randn(num_items, num_experts).topk(k)
        weights = logits.softmax(dim=-1).to(self.device, self.dtype)
        return ids.to(self.device), weights.requires_grad_()

    def start(self, suite: str) -> None:
        """Everything from here on belongs to this suite, which draws the same inputs each time."""
        torch.manual_seed(0)
        _cotangent.cache_clear()
        self.console.rule(suite)
        self.suites[suite] = {'notes': [], 'comparisons': [], 'targets': []}

    @property
    def _current(self) -> dict[str, list]:
        return next(reversed(self.suites.values()))

    def note(self, text: str) -> None:
        """A sentence between the tables."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._current['notes'].append(text)

    def target(
        self,
        text: str,
        figure: float,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = 'x',
        detail: str = '',
    ) -> None:
        """Say whether a target is met; exactly one of the two limits is given."""
        limit, met = (
            (at_least, figure >= at_least) if at_most is None else (at_most, figure <= at_most)
        )
        # Three decimals, so that 1.104x is not printed as a missed 1.10x.
        shown = f'{figure:.3f}x' if unit == 'x' else f'{figure:.3g}{unit}'
        outcome = ('met' if met else 'missed') + f' ({shown}{", " if detail else ""}{detail})'
        self.console.print(f'target: {text}: {outcome}', markup=False, soft_wrap=True)
        result = {'text': text, 'met': met, 'figure': figure, 'limit': limit, 'detail': detail}
        self._current['targets'].append(result)

    def compare(
        self,
        title: str,
        alternatives: Sequence[Alternative],
        baseline: str | None = None,
        limit: str | None = None,
        show: bool = True,
        replay: bool = False,
        watch: Sequence[tuple[str, str]] = (),
    ) -> Comparison:
        """Check all alternatives, time them in turns, and print the table.

        Args:
            title: What is compared.
            alternatives: With different names.
            baseline: Name of the alternative that ratios refer to.
            limit: Name of the alternative whose bandwidth is 100 %.
            show: Whether to print.
            replay: On a GPU, time the replay of a CUDA graph of several calls, in which the host
                starts nothing: what the device alone takes.
            watch: Names of which the first one's time relative to the second one's is what
                ``--compare`` follows.

        Raises:
            WrongResult: If an alternative does not compute what is expected.
        """
        if self.only_watched and watch:
            watched = {name for pair in watch for name in pair}
            alternatives = [a for a in alternatives if a.name in watched]
        for alternative in alternatives:
            self._check(title, alternative)
        gc.collect()
        # What the first calls compile, choose and allocate is nobody's time.
        for _ in range(WARM_UP_ROUNDS):
            round_seconds = [self._seconds(a.run) for a in alternatives]
        calls = [self._calls(seconds) for seconds in round_seconds]
        runs = [a.run for a in alternatives]
        divisors = calls
        if replay and self.device.type == 'cuda':
            runs = [_graph_of(run) for run in runs]
            divisors = [n * CALLS_PER_GRAPH for n in calls]
        rounds = self.repeats or min(
            max(int(self.seconds / sum(round_seconds)), FEWEST_ROUNDS), MOST_ROUNDS
        )
        samples: dict[str, list[float]] = {a.name: [] for a in alternatives}
        for _ in range(rounds):
            for alternative, run, n, divisor in zip(
                alternatives, runs, calls, divisors, strict=True
            ):
                samples[alternative.name].append(self._seconds(run, n) * n / divisor)
        comparison = Comparison(
            title,
            samples,
            baseline,
            limit,
            {a.name: a.num_bytes for a in alternatives if a.num_bytes is not None},
            {a.name: a.note for a in alternatives},
            watch,
        )
        self._current['comparisons'].append(comparison.as_dict())
        if show:
            self.console.print(f'\n{title}', style='bold', markup=False)
            self.console.print(comparison.table())
        return comparison

    def _check(self, title: str, alternative: Alternative) -> None:
        if alternative.expected is None:
            return
        tolerance = TOLERANCES[self.dtype]
        if self.device.type == 'cuda':
            tolerance = max(tolerance, TF32_TOLERANCE)
        got = alternative.run() or {}
        where = f'{title}: {alternative.name!r}'
        for name, expected in alternative.expected.items():
            if name not in got:
                raise WrongResult(f'{where} computes no {name}')
            error = _relative_error(_stacked(got[name]), _stacked(expected))
            # Not `error > tolerance`, which a NaN passes.
            if not error <= tolerance:
                raise WrongResult(
                    f'{where} gives a wrong {name}: it differs by {error:.2g} of the largest '
                    f'value, {tolerance:g} is allowed'
                )

    def _calls(self, seconds: float) -> int:
        return 1 if self.device.type == 'cpu' else 1 + int(SECONDS_PER_GPU_SAMPLE / seconds)

    @staticmethod
    def _seconds(run: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call in a row, results freed, a GPU's work done, no garbage collected."""
        # Imported late: where there is nvcc but no GPU, that says so on stderr.
        from torch.utils.benchmark import timer

        return timeit.Timer(run, timer=timer).timeit(calls) / calls


def waits(run: Callable[[], object]) -> list[str]:
    """The places, ``file:line``, at which the host waits for the GPU."""
    for _ in range(3):  # first calls allocate and choose algorithms
        run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return [f'{w.filename}:{w.lineno}' for w in found if 'synchronizing CUDA' in str(w.message)]


def _graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of :data:`CALLS_PER_GRAPH` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_ROUNDS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            run()
    return graph.replay


def _stacked(value: Tensor | list[Tensor]) -> Tensor:
    return value if isinstance(value, Tensor) else torch.stack(value)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float('inf')
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else float('inf')
    difference = (got.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max().clamp(min=1e-30))
