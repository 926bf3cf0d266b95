"""What moved, on figures written by hand."""

import json
import random
from dataclasses import replace

import pytest
from rich.console import Console

from mmdet_moe.errors import ConfigError
from research.benchmarks import moved
from research.benchmarks.moved import Figure, Move, figures_of, interval_of_median, moves

FIGURE = Figure('conv', '4×8×6×6; forward', 'auto', 'loop', 0.5, (0.48, 0.52), 1.0)


def report(samples, watch=(('ours', 'theirs'),), **environment):
    """As tools/benchmark_moe.py writes it."""
    return {
        'environment': {
            'date': '2026-01-02 03:04:05 +0000',
            'commit': 'abc',
            'python': '3.11.2',
            'platform': 'Linux-of-somebody',
            'versions': {'mmdet_moe': '1', 'torch': '2.14.1'},
            'cpu': 'A processor',
            'cpus': 2,
            'threads': 2,
            'load_average': [0.1, 2.0, 2.0],
            'device': 'A processor',
            'kernels': [
                {'device': 'cpu', 'native': True, 'detail': '/home/somebody/ops.so'},
                {'device': 'cuda', 'native': False, 'detail': 'none'},
            ],
            **environment,
        },
        'settings': {'device': 'cpu', 'dtype': 'float32'},
        'suites': {
            'ops': {
                'comparisons': [
                    {
                        'title': 'some',
                        'watch': watch,
                        'rows': [{'name': n, 'samples_ms': s} for n, s in samples.items()],
                    }
                ]
            }
        },
    }


def test_ratios_are_those_of_the_rounds():
    theirs = [1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0]  # a machine that is not quiet
    ratios = [0.5, 0.6, 0.4, 0.55, 0.45, 0.52, 0.48]
    ours = [a * b for a, b in zip(ratios, theirs, strict=True)]
    (figure,) = figures_of(report({'ours': ours, 'theirs': theirs, 'other': theirs}))
    assert figure.key == ('ops', 'some', 'ours', 'theirs')
    assert figure.ratio == pytest.approx(0.5)
    # Of 7 values, the median lies between the first and the last with 1 - 2 / 2⁷ = 98 %.
    assert figure.interval == pytest.approx((0.4, 0.6))
    assert figure.ms == pytest.approx(1.2)


@pytest.mark.parametrize(
    ('n', 'ranks'),
    [(5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (50, (18, 33))],
)
def test_interval_of_median(n, ranks):
    """The ranks of the tables: Conover, table A3; Bland, Introduction to Medical Statistics."""
    values = random.Random(0).sample(range(1, n + 1), n)
    assert interval_of_median(values) == ranks


@pytest.mark.parametrize(
    ('ratio', 'interval', 'verdict'),
    [
        (0.5, (0.48, 0.52), ''),
        (0.64, (0.515, 0.66), ''),
        (0.64, (0.63, 0.65), 'moved: slower'),
        (0.36, (0.35, 0.37), 'moved: faster'),
        (0.36, (0.35, 0.48), ''),
        (0.59, (0.58, 0.595), ''),  # apart, by less than 20 %
        (0.9, None, 'too few rounds'),
    ],
    ids=['same', 'overlap', 'slower', 'faster', 'touch', 'little', 'rounds'],
)
def test_moved_only_where_the_intervals_are_apart(ratio, interval, verdict):
    move = Move(FIGURE, replace(FIGURE, ratio=ratio, interval=interval, ms=100.0))
    assert move.verdict == verdict
    assert move.fails == (verdict == 'moved: slower')
    assert move.change == pytest.approx(ratio / 0.5 - 1)


def test_what_only_one_of_them_has():
    new, gone, other = (replace(FIGURE, title=title) for title in ('new', 'gone', 'other'))
    other = replace(other, suite='mumoe')  # which was not asked for
    found = moves([gone, FIGURE, other], [new, FIGURE], ['conv'])
    assert found == [Move(None, new), Move(FIGURE, FIGURE), Move(gone, None)]
    assert [move.verdict for move in found] == ['new', '', 'missing']
    assert [move.fails for move in found] == [False, False, True]
    assert [move.change for move in found] == [None, 0, None]
    now = report({}, ())
    summary = moved.summary_of(found, {}, now)
    assert summary == '3 ratios: 1 missing, 1 new.'
    assert moved.summary_of(found[1:2], {}, now) == '1 ratios: none moved.'


def test_another_machine_is_said():
    now = report({}, ())
    then = moved.conditions_of(now)
    assert not moved.differences(then, now)
    older = {'mmdet_moe': '0', 'torch': '2.13.0'}
    other = then | {'device': 'Another', 'threads': 4, 'date': '2025-01-01', 'versions': older}
    assert moved.differences(other, now) == [
        'device was Another, is A processor',
        'threads was 4, is 2',
        'torch was 2.13.0, is 2.14.1',
    ]
    summary = moved.summary_of([Move(FIGURE, FIGURE)], other, now)
    assert summary.endswith('Ratios depend on this, too: ' + '; '.join(
        moved.differences(other, now)) + '.')  # fmt: skip
    busy = 'the machine was busy at the start (load average 1.5)'
    for before in ({}, then):
        assert moved.differences(before, report({}, (), load_average=[1.5, 0, 0])) == [busy]
    assert not moved.differences(then, report({}, (), load_average=None))


def test_kept_figures(tmp_path):
    """They are read as they were, to five digits, and name no folder and no machine."""
    samples = {'ours': [1 / 3] * 6, 'theirs': [0.7] * 6}
    path = tmp_path / 'figures' / 'cpu.json'
    moved.write_figures(path, report(samples), 'the command')
    assert 'somebody' not in path.read_text()
    assert json.loads(path.read_text())['command'] == 'the command'
    conditions, (figure,) = moved.read_figures(path)
    assert conditions == moved.conditions_of(report(samples))
    assert figure == Figure('ops', 'some', 'ours', 'theirs', 0.47619, (0.47619, 0.47619), 0.33333)


@pytest.mark.parametrize(
    'text', ['', '[]', '{"figures": []}', '{"conditions": {}, "figures": [1]}']
)
def test_other_files(tmp_path, text):
    path = tmp_path / 'x.json'
    with pytest.raises(ConfigError, match=r'there are no figures in .*x.json; write them'):
        moved.read_figures(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r'x.json holds no figures that --update wrote'):
        moved.read_figures(path)
    with pytest.raises(ConfigError, match=r'holds no figures that --update wrote'):
        moved.read_figures(tmp_path)  # a folder


def test_the_committed_figures():
    paths = list(moved.FOLDER.glob('*.json'))
    assert paths
    for path in paths:
        conditions, figures = moved.read_figures(path)
        assert {figure.suite for figure in figures} > {'ops', 'conv', 'mumoe'}
        assert all(figure.interval for figure in figures)
        assert conditions['threads'] == 2


def test_table():
    faster = replace(FIGURE, ratio=0.3, interval=(0.29, 0.31), ms=3.0)
    console = Console(width=150)
    with console.capture() as capture:
        console.print(moved.table_of([Move(FIGURE, faster), Move(None, FIGURE)]))
    lines = capture.get().splitlines()
    (line,) = (line for line in lines if 'moved: faster' in line)
    for cell in ('0.500 (0.480 – 0.520)', '0.300 (0.290 – 0.310)', '-40.0 %', ' 1 ', ' 3 '):
        assert cell in line
    assert sum('auto ÷ loop' in line for line in lines) == 2
    assert 'are not judged' in ' '.join(capture.get().split())
