"""Whether the API reference is complete: every public name is in it, and has a docstring.

Public is what the ``__all__`` of :data:`PACKAGES` lists, and what a config can name.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

PACKAGES = [
    f'mmdet_moe.{name}'
    for name in (
        *('moe', 'moe.experts', 'moe.mumoe', 'moe.editing', 'moe.surgery', 'ops'),
        *('engine.hooks', 'engine.metrics', 'models', 'datasets'),
    )
]
REGISTRIES = ('MODELS', 'HOOKS', 'METRICS', 'DATASETS')


def registered() -> Iterator[tuple[str, str, Any]]:
    """Registry, name in a config, and object of all that a config can name."""
    module = importlib.import_module('mmdet_moe.registry')
    for name in REGISTRIES:
        registry = getattr(module, name)
        registry.import_from_location()
        for key, value in sorted(registry.module_dict.items()):
            if value.__module__.startswith('mmdet_moe.'):
                yield name, key, value


def find(name: str) -> Any:
    """The object of a dotted name, or None."""
    parts = name.split('.')
    for i in range(1, len(parts) + 1):
        try:
            found = importlib.import_module('.'.join(parts[:i]))
        except ImportError:
            return None
        for part in parts[i:]:
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def complaints(names: set[str]) -> list[str]:
    """What keeps a reference with these names from being complete."""
    documented = [find(name) for name in names]
    ids = set(map(id, documented))
    missing = [
        f'{package}.{name}'
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
        if f'{package}.{name}' not in names and id(find(f'{package}.{name}')) not in ids
    ]
    missing += [
        f"mmdet_moe.{name} in a config's {registry}"
        for registry, name, value in registered()
        if id(value) not in ids
    ]
    silent = []
    for name, value in zip(names, documented, strict=True):
        if inspect.isclass(value):
            if not vars(value).get('__doc__'):
                silent.append(name)
            silent += [
                f'{name}.{member}'
                for member in vars(value)
                if member[0] != '_' and is_code(vars(value)[member])
                if not any(
                    getattr(vars(base).get(member), '__doc__', None) for base in value.__mro__
                )
            ]
        elif inspect.isfunction(value) and '.' not in value.__qualname__ and not value.__doc__:
            silent.append(name)
    return [f'{name} is not in the API reference' for name in missing] + [
        f'{name} has no docstring' for name in sorted(silent)
    ]


def is_code(member: Any) -> bool:
    return inspect.isroutine(member) or isinstance(member, (property, classmethod, staticmethod))
