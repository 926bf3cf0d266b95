"""The figures of a GPU in ``docs/gpu.md``, from what ``tools/benchmark_moe.py`` wrote."""

import re
from pathlib import Path
from typing import Any

from research.experiments.markdown import replace_between_markers, table


def write_page(page: Path, report: dict[str, Any], checks: list[str]) -> None:
    """Replace what stands between the two marks of a page.

    Args:
        page: A Markdown file with the marks.
        report: Content of the file that ``tools/benchmark_moe.py --json`` writes.
        checks: What was checked beside the figures, one sentence each.

    Raises:
        ConfigError: If the page has no marks.
    """
    facts, settings = report['environment'], report['settings']
    lines = [
        f'{facts["device"]}, CUDA {facts["cuda"]}, PyTorch {facts["versions"]["torch"]}, '
        f'{settings["dtype"]}, {facts["date"][:10]}: what `make gpu` found. Medians in '
        'milliseconds; × and % are medians over the rounds of a ratio, not the ratio of medians.',
        '',
        *(f'- {check}' for check in checks),
    ]
    for suite, results in report['suites'].items():
        lines += ['', f'#### {suite}']
        for comparison in results['comparisons']:
            lines += ['', _table(comparison)]
        if results['targets']:
            lines += ['', *map(_target, results['targets'])]
    replace_between_markers(page, 'gpu figures', '\n'.join(lines))


def _table(comparison: dict[str, Any]) -> str:
    baseline, limit = comparison['baseline'], comparison['limit']
    has_notes = any(row.get('note') for row in comparison['rows'])
    titles = [_escaped(comparison['title']), 'ms']
    titles += [f'× {baseline}'] * bool(baseline) + [f'% of {limit}'] * bool(limit)
    titles += [''] * has_notes
    rows = []
    for row in comparison['rows']:
        cells = [_escaped(row['name']), f'{row["median_ms"]:.4g}']
        if baseline:
            cells.append(f'{row["ratio"]:.2f}')
        if limit:
            share = row.get('share_of_limit')
            cells.append('' if share is None else f'{100 * share:.0f}')
        if has_notes:
            cells.append(_escaped(row.get('note', '')))
        rows.append(cells)
    return table(titles, rows)


def _target(target: dict[str, Any]) -> str:
    outcome = 'met' if target['met'] else '**missed**'
    return f'- {_escaped(target["text"])}: {outcome} ({target["figure"]:.3g})'


def _escaped(text: str) -> str:
    return re.sub(r'([|<>])', r'\\\1', text)
