"""Classes that can only be had where their toolbox is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import MODELS

_MISSING: dict[str, str] = {}


@contextmanager
def needs(toolbox: str, *names: str) -> Iterator[None]:
    """``with needs('mmdet', 'MoEFPN'): import ...`` survives that MMDetection is missing.

    The names are registered all the same, as functions that say what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for name in names:
            _MISSING[name] = _explain(name, toolbox, error)
            if name not in MODELS.module_dict:

                def build(*_: Any, _name: str = name, **__: Any) -> NoReturn:
                    get_missing(_name)

                MODELS.register_module(name=name, module=build)


def require(toolbox: str, name: str) -> None:
    """Import a toolbox that ``mmdet_moe.<name>`` needs.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import_module(toolbox)
    except ModuleNotFoundError as error:
        raise ConfigError(_explain(name, toolbox, error)) from error


def _explain(name: str, toolbox: str, error: ModuleNotFoundError) -> str:
    package = (error.name or '').partition('.')[0]
    if package not in (toolbox, 'mmcv'):
        raise error
    return (
        f'mmdet_moe.{name} needs {package}, which is not installed: '
        f"pip install 'mmdet_moe[{toolbox}]'"
    )


def get_missing(name: str) -> NoReturn:
    """The attribute ``name`` of :mod:`mmdet_moe.models`, which it has not.

    Raises:
        ConfigError: Its toolbox is missing.
        AttributeError: There is no such name in any case.
    """
    if name in _MISSING:
        raise ConfigError(_MISSING[name])
    raise AttributeError(f"module 'mmdet_moe.models' has no attribute {name!r}")
