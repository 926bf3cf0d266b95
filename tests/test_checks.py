"""Checks of options."""

import math
import re

import numpy as np
import pytest
import torch

from mmdet_moe.checks import check_flag, check_integer, check_number, check_options
from mmdet_moe.errors import ConfigError


@pytest.mark.parametrize('value', [1, 7, np.int64(3)])
def test_integers(value):
    check_integer('Owner', 'field', value, least=1)


@pytest.mark.parametrize('value', [0, -1, 1.0, 2.5, True, None, '3', math.nan, torch.tensor(3)])
def test_no_integers(value):
    message = re.escape(f'Owner: field={value!r} must be an integer of at least 1')
    with pytest.raises(ConfigError, match=f'^{message}$'):
        check_integer('Owner', 'field', value, least=1)


@pytest.mark.parametrize('value', [0, 0.5, 10, np.float32(0.1)])
def test_numbers(value):
    check_number('Owner', 'field', value, least=0)
    check_number('Owner', 'field', value, above=-0.1)
    check_number('Owner', 'field', -value)


@pytest.mark.parametrize('value', [-1e-9, math.nan, math.inf, True, None, '1e-3', (1, 2)])
def test_no_numbers(value):
    message = re.escape(f'Owner: field={value!r} must be a finite number of at least 0')
    with pytest.raises(ConfigError, match=f'^{message}$'):
        check_number('Owner', 'field', value, least=0)


def test_greater_than():
    with pytest.raises(ConfigError, match=r'^Owner: x=0 must be a finite number greater than 0$'):
        check_number('Owner', 'x', 0, above=0)


def test_flags():
    check_flag('Owner', 'field', False)
    for value in ('False', 0, None):
        with pytest.raises(ConfigError, match=f'^Owner: field={value!r} must be True or False$'):
            check_flag('Owner', 'field', value)


def test_options():
    check_options('Owner', 'field', {'lr': 1}, ('lr', 'momentum'))
    message = r"^Owner: field has unknown keys \['3', 'rl'\]; known are \['lr', 'momentum'\]$"
    with pytest.raises(ConfigError, match=message):
        check_options('Owner', 'field', {'rl': 1, 'lr': 1, 3: 1}, ('lr', 'momentum'))
    for value in (None, 0.1, [('lr', 1)]):
        message = re.escape(f'Owner: field={value!r} must be a dict')
        with pytest.raises(ConfigError, match=f'^{message}$'):
            check_options('Owner', 'field', value, ('lr',))
