"""Checks of options that come out of a config, where a wrong type is as easily written as a wrong
number; their errors name the option."""

import inspect
import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

from mmdet_moe.errors import ConfigError


def check_integer(owner: str, field: str, value: Any, least: int) -> int:
    """The value as an ``int``; what is no integer of at least ``least`` is refused.

    Args:
        owner: The class, or whatever else has the option.
        field: Name of the option.
        value: What it was set to.
        least: The smallest value allowed.

    Raises:
        ConfigError: Naming all of them.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f'{owner}: {field}={value!r} must be an integer of at least {least}')
    return int(value)


def check_number(
    owner: str, field: str, value: Any, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Refuse what is no finite number of at least ``least`` and greater than ``above``.

    Args:
        owner, field, value: As for :func:`check_integer`.
        least: The smallest value allowed.
        above: The largest value that is just too small.

    Raises:
        ConfigError: Naming all of them.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least or value <= above:
        bounds = f' of at least {least:g}' if least > -math.inf else ''
        bounds += f' greater than {above:g}' if above > -math.inf else ''
        raise ConfigError(f'{owner}: {field}={value!r} must be a finite number{bounds}')


def check_indices(field: str, value: Any, least: int, most: int) -> tuple[int, ...]:
    """One index, or a sequence of different ones, as a tuple.

    Args:
        field: Name of the option, and what it counts if that is not plain.
        value: What it was set to.
        least, most: The smallest and the largest of them.

    Raises:
        ConfigError: For anything else.
    """
    found = tuple(value) if isinstance(value, (list, tuple, range)) else (value,)
    are_known = all(type(index) is int and least <= index <= most for index in found)
    if not found or not are_known or len(set(found)) < len(found):
        raise ConfigError(f'{field}={value!r} must name some of {least} to {most}, each once')
    return found


def name_of(type_: Any) -> str:
    """Of a class that a config gives as itself, or by its name, with or without a registry's."""
    return getattr(type_, '__name__', str(type_)).rpartition('.')[2]


def check_flag(owner: str, field: str, value: Any) -> None:
    """Refuse what is neither True nor False, such as the text ``'False'``.

    Args:
        owner, field, value: As for :func:`check_integer`.

    Raises:
        ConfigError: Naming all of them.
    """
    if not isinstance(value, bool):
        raise ConfigError(f'{owner}: {field}={value!r} must be True or False')


def check_options(owner: str, field: str, value: Any, known: Collection[str]) -> None:
    """Refuse what is no dict, and a dict with other keys, such as ``'normalise'``.

    Args:
        owner, field, value: As for :func:`check_integer`.
        known: The keys that the dict may have.

    Raises:
        ConfigError: Naming the field and the keys.
    """
    if not isinstance(value, dict):
        raise ConfigError(f'{owner}: {field}={value!r} must be a dict')
    if unknown := sorted(map(str, set(value) - set(known))):
        raise ConfigError(f'{owner}: {field} has unknown keys {unknown}; known are {list(known)}')


def fields_of(built: Callable) -> list[str]:
    """The arguments that a class, with its base classes, or a function takes by name."""
    # Arguments pass on to base classes through **kwargs.
    callables = [c.__init__ for c in inspect.getmro(built)] if inspect.isclass(built) else [built]
    parameters = [
        parameter.name
        for function in callables
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name != 'self'
    ]
    return list(dict.fromkeys(parameters))
