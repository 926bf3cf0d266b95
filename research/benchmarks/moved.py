"""What moved since the figures that are kept in ``figures/``: ratios then and now."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdet_moe.errors import ConfigError

#: Of the figures that are kept.
FOLDER = Path(__file__).parent / 'figures'
#: Of the interval around the median of a ratio.
CONFIDENCE = 0.95
#: Two processes place the same tensors elsewhere in memory, which the rounds of one do not show: of
#: 43 ratios one differed by 18 % between two runs of the same code on an idle machine, and two by 7
#: to 8 %. Less than this relative change is never called a move.
SMALLEST_MOVE = 0.2
NOT_MEASURED = (
    'GPUs (`make gpu`); bfloat16 and float16; several processes; memory, and the page faults of '
    'new blocks, which differ by three times between runs of the same code; the time to import and '
    'to start; the accuracy of anything; larger shapes, and those that the suite `auto` draws; '
    'the size and loading of the report (suite `explorer`)'
)
#: What ratios depend on besides this package.
CONDITIONS = ('device', 'threads', 'kernels', 'dtype')


@dataclass(frozen=True)
class Figure:
    """How many times the time of one alternative another one takes.

    Attributes:
        suite: Of the benchmark.
        title: Of the comparison.
        name: The alternative of this package.
        other: What it is measured against, in the same rounds.
        ratio: Median over the rounds; less is faster.
        interval: The median lies in it with :data:`CONFIDENCE`; None for fewer than 6 rounds.
        ms: Median of ``name``.
    """

    suite: str
    title: str
    name: str
    other: str
    ratio: float
    interval: tuple[float, float] | None
    ms: float

    @property
    def key(self) -> tuple[str, ...]:
        """What is the same in every run."""
        return self.suite, self.title, self.name, self.other


def figures_of(report: dict[str, Any]) -> list[Figure]:
    """The watched ratios in the report of ``tools/benchmark_moe.py``."""
    figures = []
    for suite, results in report['suites'].items():
        for comparison in results['comparisons']:
            samples = {row['name']: row['samples_ms'] for row in comparison['rows']}
            for name, other in comparison['watch']:
                ratios = [a / b for a, b in zip(samples[name], samples[other], strict=True)]
                figures.append(
                    Figure(
                        suite,
                        comparison['title'],
                        name,
                        other,
                        statistics.median(ratios),
                        interval_of_median(ratios),
                        statistics.median(samples[name]),
                    )
                )
    return figures


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The distribution-free interval between two of the values; None where they are too few.

    Conover, Practical Nonparametric Statistics (1999), section 3.2.
    """
    from scipy import stats  # takes a second, which only a comparison needs

    # Even the smallest and the largest hold the median with no more than this.
    if 1 - 2 * 0.5 ** len(values) < CONFIDENCE:
        return None
    interval = stats.quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def conditions_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on, without what names a machine or a person."""
    facts, settings = report['environment'], report['settings']
    return {
        'date': facts['date'][:10],
        'commit': facts['commit'],
        'python': facts['python'],
        'versions': facts['versions'],
        'device': facts['device'],
        'threads': facts['threads'],
        'kernels': next(
            'compiled' if entry['native'] else 'reference'
            for entry in facts['kernels']
            if entry['device'] == settings['device']
        ),
        'dtype': settings['dtype'],
    }


def write_figures(path: Path, report: dict[str, Any], command: str) -> None:
    """Keep the watched ratios of a report as what later ones are compared with."""
    figures = [_rounded(asdict(figure)) for figure in figures_of(report)]
    kept = {'command': command, 'conditions': conditions_of(report), 'figures': figures}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + '\n')


def read_figures(path: Path) -> tuple[dict[str, Any], list[Figure]]:
    """The conditions and the figures that :func:`write_figures` wrote.

    Raises:
        ConfigError: If there is no such file, or it is another one.
    """
    try:
        kept = json.loads(path.read_text())
        figures = [
            Figure(**{**f, 'interval': f['interval'] and tuple(f['interval'])})
            for f in kept['figures']
        ]
        return kept['conditions'], figures
    except FileNotFoundError:
        raise ConfigError(f'there are no figures in {path}; write them with --update') from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f'{path} holds no figures that --update wrote') from None


@dataclass(frozen=True)
class Move:
    """One ratio then and now; None where it was not, or is no longer measured."""

    then: Figure | None
    now: Figure | None

    @property
    def change(self) -> float | None:
        """Of the ratio, relative; more than 0 is slower."""
        return self.now.ratio / self.then.ratio - 1 if self.then and self.now else None

    @property
    def verdict(self) -> str:
        """``moved: …`` only if the intervals are apart, by more than :data:`SMALLEST_MOVE`."""
        if self.then is None:
            return 'new'
        if self.now is None:
            return 'missing'
        if self.then.interval is None or self.now.interval is None:
            return 'too few rounds'
        (then_low, then_high), (low, high) = self.then.interval, self.now.interval
        apart = then_high < low or high < then_low
        if not apart or abs(self.change) < SMALLEST_MOVE:
            return ''
        return 'moved: slower' if self.change > 0 else 'moved: faster'

    @property
    def fails(self) -> bool:
        """Whether ``--fail`` makes something of it."""
        return self.verdict in ('moved: slower', 'missing')


def moves(then: Iterable[Figure], now: Iterable[Figure], suites: Iterable[str]) -> list[Move]:
    """Every ratio of the suites, in the order of this run, then those that it lacks."""
    wanted = set(suites)
    before = {figure.key: figure for figure in then if figure.suite in wanted}
    found = [Move(before.pop(figure.key, None), figure) for figure in now]
    return found + [Move(figure, None) for figure in before.values()]


def differences(then: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """What ratios depend on, and is no longer as it was; and whether the machine is busy."""
    now, facts = conditions_of(report), report['environment']
    was, versions = then | then.get('versions', {}), now['versions']
    told = [
        f'{name} was {was.get(name)}, is {value}'
        for name, value in (now | versions).items()
        if then
        and (name in CONDITIONS or (name in versions and name != 'mmdet_moe'))
        and was.get(name) != value
    ]
    load = (facts['load_average'] or [0])[0]
    if load > facts['cpus'] / 4:
        told.append(f'the machine was busy at the start (load average {load:.1f})')
    return told


def table_of(found: Sequence[Move]) -> Table:
    """One line per ratio."""
    table = Table(
        caption=f'Ratio of times, less is faster; in brackets: {CONFIDENCE:.0%} of the median. '
        f'"moved" means that the intervals are apart, and the medians by {SMALLEST_MOVE:.0%} or '
        'more. The milliseconds are those of the machine, and are not judged.',
        caption_justify='left',
    )
    table.add_column('what')
    for column in ('then', 'now', 'change', 'ms then', 'ms now'):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('', no_wrap=True)
    suite = None
    for move in found:
        figure = move.now or move.then
        if suite not in (None, figure.suite):
            table.add_section()
        suite = figure.suite
        change = '' if move.change is None else f'{100 * move.change:+.1f} %'
        table.add_row(
            f'{suite}: {figure.title}\n  {figure.name} ÷ {figure.other}',
            _ratio(move.then),
            _ratio(move.now),
            change,
            *(f'{f.ms:.4g}' if f else '' for f in (move.then, move.now)),
            move.verdict,
        )
    return table


def summary_of(found: Sequence[Move], then: dict[str, Any], report: dict[str, Any]) -> str:
    """One sentence on how many moved, and one on what else is not as it was."""
    counts = Counter(move.verdict for move in found if move.verdict)
    told = ', '.join(f'{count} {verdict}' for verdict, count in sorted(counts.items()))
    summary = f'{len(found)} ratios: {told or "none moved"}.'
    if other := differences(then, report):
        summary += f' Ratios depend on this, too: {"; ".join(other)}.'
    return summary


def _ratio(figure: Figure | None) -> str:
    if figure is None:
        return ''
    if figure.interval is None:
        return f'{figure.ratio:.3f}'
    low, high = figure.interval
    return f'{figure.ratio:.3f} ({low:.3f} – {high:.3f})'


def _rounded(value: Any) -> Any:
    """Five digits: a file that one can read."""
    if isinstance(value, float):
        return float(f'{value:.5g}')
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
