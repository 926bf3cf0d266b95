"""What many GPUs would move and wait for, against sums by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from research.benchmarks import scaling
from research.benchmarks.scaling import WORK, Cluster, imbalance, reduced_bytes, simulate


def test_the_page_has_the_tables_of_the_command():
    page = (Path(__file__).parents[2] / 'docs' / 'scaling.md').read_text()
    for name, table in (('bytes', scaling.bytes_table()), ('steps', scaling.steps_table())):
        marked = re.search(f'<!-- scaling {name}:begin -->\n(.*?)\n<!--', page, re.DOTALL)
        assert marked.group(1) == table


def test_fullest_rank():
    """Of a rank for each of two experts: the larger of two multinomial counts, E|X − n/2| above."""
    work = replace(WORK, items=50, top_k=1, experts=2)
    # The mean distance of a binomial of n = 100 from its mean is sqrt(n / 4) · sqrt(2 / π).
    assert imbalance(work, 2, 2, 0) == pytest.approx(1 + 5 * (2 / 3.14159) ** 0.5 / 50, abs=0.02)
    assert imbalance(work, 2, 1, 0.5) == 1
    assert imbalance(work, 2, 2, 0.9) > imbalance(work, 2, 2, 0.1) > 1


def test_a_step_by_hand():
    cluster = Cluster(flops=1e12, inside=1e9, outside=1e8, latency=0)
    work = scaling.Work(
        items=100, top_k=1, experts=4, numbers_in=10, numbers_out=30, expert_parameters=1000,
        dense_parameters=8000, flops=1e9, dense_flops=2e9, layers=1,
    )  # fmt: skip
    step = simulate(work, 8, 1, 0, cluster)
    assert step.exchanged == 0
    assert step.reduced == 2 * 2 * 12_000 * 7 / 8
    assert step.seconds == pytest.approx(0.3 + 0.006 + step.reduced / 1e9)
    step = simulate(work, 8, 4, 0, cluster)
    assert step.exchanged == 2 * 2 * 40 * 75
    assert step.reduced == 2 * 2 * (8000 * 7 / 8 + 1000 * 1 / 2)
    assert step.memory == 16 * 9000
    assert reduced_bytes(8000, 4000, 4, 4, 2) == 2 * 2 * 8000 * 3 / 4
