"""The sample of a sweep that is run without ``--all``."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

CASES = [
    SimpleNamespace(nodeid=f'test[{a}-{b}]', callspec=SimpleNamespace(indices={'a': a, 'b': b}))
    for a in range(12)
    for b in range(8)
]


@pytest.fixture
def sample(request):
    """``sample(cases, share)``: the values of the cases that are run."""
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name('conftest.py')))

    def of(cases, share, seen=None):
        rest = conftest.left_out(cases, share, Counter() if seen is None else seen)
        return {tuple(c.callspec.indices.values()) for c in cases if c not in rest}

    return of


def test_size_and_values(sample):
    kept = sample(CASES, 1 / 8)
    assert len(kept) == 12
    assert {a for a, _ in kept} == set(range(12))
    assert {b for _, b in kept} == set(range(8))
    assert len(sample(CASES, 1e-9)) == 1
    assert len(sample(CASES, 1)) == len(CASES)


def test_order_of_the_cases_is_all_the_same(sample):
    assert sample(CASES[::-1], 0.2) == sample(CASES, 0.2)


def test_tests_of_a_file_take_turns(sample):
    seen, models = Counter(), [case for case in CASES if case.callspec.indices['b'] == 0]
    kept = [sample(models, 1 / 4, seen) for _ in range(4)]
    assert len(set.union(*kept)) == len(models)
