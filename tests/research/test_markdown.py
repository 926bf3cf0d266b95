"""Generated tables inside pages that people write."""

import math

import pytest

from mmdet_moe.errors import ConfigError
from research.experiments.markdown import (
    mean_and_std,
    mean_per_layer,
    replace_between_markers,
    table,
)
from research.runs import mean_std


def test_table():
    assert table(['a', 'b'], [['1', '2'], ['3', '4']]).splitlines() == [
        '| a | b |', '| --- | --- |', '| 1 | 2 |', '| 3 | 4 |',
    ]  # fmt: skip


def test_numbers():
    assert mean_and_std([0.4, 0.6]) == '0.500 ± 0.141'
    assert mean_and_std([0.4], digits=1) == '0.4'
    assert mean_per_layer([[0.1, 1.0], [0.3, 2.0]]) == '0.20 / 1.50'


def test_one_seed_has_no_deviation():
    mean, std = mean_std([0.3])
    assert mean == 0.3
    assert math.isnan(std)


def test_only_the_marked_part_is_rewritten(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n')
    replace_between_markers(page, 'a', 'new')
    assert page.read_text() == 'before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n'
    with pytest.raises(ConfigError, match='lacks the markers <!-- b:begin -->'):
        replace_between_markers(page, 'b', 'new')
    assert 'new' in page.read_text()
