"""Comparing the settings of a run with those that are asked for."""

import pytest
from mmengine.config import Config

from mmdet_moe.analysis.experiments.settings import difference

FOUND = {
    'work_dir': 'a', 'resume': True, 'load_from': 'x', 'launcher': 'none',
    'model': {'depth': 18, 'stages': (1, 2)}, 'hooks': [{'type': 'A'}, {'type': 'B', 'k': 1}],
}  # fmt: skip


def test_places_do_not_matter():
    wanted = {**FOUND, 'work_dir': 'b', 'resume': False, 'load_from': None}
    del wanted['launcher']
    assert difference(Config(FOUND), Config(wanted)) is None


def test_a_list_is_a_tuple():
    """A config file that was written and read again may have the one for the other."""
    wanted = {**FOUND, 'model': {'depth': 18, 'stages': [1, 2]}}
    assert difference(Config(FOUND), Config(wanted)) is None


@pytest.mark.parametrize(('change', 'text'), [
    ({'model': {'depth': 34, 'stages': (1, 2)}}, 'model.depth: 18 there, 34 now'),
    ({'model': {'depth': 18, 'stages': (1, 3)}}, 'model.stages[1]: 2 there, 3 now'),
    ({'model': {'depth': 18, 'stages': (1,)}}, 'model.stages: (1, 2) there, (1,) now'),
    ({'hooks': [{'type': 'A'}, {'type': 'B', 'k': 2}]}, 'hooks[1].k: 1 there, 2 now'),
    ({'hooks': [{'type': 'A'}, {'type': 'B'}]}, 'hooks[1].k: 1 there, nothing now'),
    ({'seed': 0}, 'seed: nothing there, 0 now'),
])  # fmt: skip
def test_first_difference(change, text):
    assert difference(Config(FOUND), Config({**FOUND, **change})) == text
