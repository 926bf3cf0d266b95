"""Which modules of a model a dotted path with globs names."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmdet_moe.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """One place in a model that a path names.

    Attributes:
        parent: Path of the module that holds it; empty for the model itself.
        names: Its name there, or those of several siblings that run one after the other.
    """

    parent: str
    names: tuple[str, ...]

    @property
    def paths(self) -> list[str]:
        """The paths of its modules."""
        return [f'{self.parent}.{name}' if self.parent else name for name in self.names]

    def __str__(self) -> str:
        if len(self.names) == 1:
            return self.paths[0]
        group = f'{{{",".join(self.names)}}}'
        return f'{self.parent}.{group}' if self.parent else group


def find_places(model: nn.Module, at: str, every: str | None = None) -> list[Place]:
    """All places that a path names, in the order of the model.

    Args:
        model: Where to look.
        at: Names of modules, from the model down, with dots in between. ``*`` stands for a name or
            a part of one, ``**`` for any number of names; ``{a,b}`` as the last one for siblings
            that run one after the other and become one expert.
        every: Name of a class. The places are then all modules of that class, or of one derived
            from it, below (or at) those that ``at`` names; none inside of another.

    Raises:
        ConfigError: If there are none, with the nearest names.
    """
    if not isinstance(at, str) or not at or any(not part for part in _split(at)):
        raise ConfigError(f"at={at!r} must be a dotted path, such as 'backbone.layer4'")
    *above, last = _split(at)
    if last.startswith('{') and last.endswith('}'):
        if every is not None:
            raise ConfigError(
                f'at={at!r}: every={every!r} cannot be combined with siblings in {{}}'
            )
        names = tuple(name.strip() for name in last[1:-1].split(','))
        parents = _matching(model, '.'.join(above)) if above else ['']
        places = [Place(parent, names) for parent in parents]
        for place in places:
            for path in place.paths:
                if not _has(model, path):
                    raise _nothing(model, at, path)
        return places
    found = _matching(model, at)
    if not found:
        raise _nothing(model, at, at)
    if every is not None:
        found = _outermost(path for path in _below(model, found) if _is_a(model, path, every))
        if not found:
            kinds = sorted({type(model.get_submodule(p)).__name__ for p in _below(model, [at])}) \
                if _has(model, at) else []  # fmt: skip
            hint = f'; there are {", ".join(kinds)}' if kinds else ''
            raise ConfigError(f'at={at!r}: every={every!r} names no module there{hint}')
    return [Place(*_parted(path)) for path in found]


def _split(at: str) -> list[str]:
    """At the dots that are not inside braces."""
    return re.split(r'\.(?![^{]*})', at)


def _parted(path: str) -> tuple[str, tuple[str]]:
    parent, _, name = path.rpartition('.')
    return parent, (name,)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _matching(model: nn.Module, at: str) -> list[str]:
    pattern = ''
    for part in _split(at):
        if part == '**':
            pattern += r'(?:[^.]+\.)*'
        else:
            pattern += ''.join('[^.]*' if c == '*' else re.escape(c) for c in part) + r'\.'
    regex = re.compile(pattern)
    # Under all their names: one that is found under a second name is not overlooked.
    names = (name for name, _ in model.named_modules(remove_duplicate=False) if name)
    return [name for name in names if regex.fullmatch(name + '.')]


def _below(model: nn.Module, paths: list[str]) -> list[str]:
    return [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if any(name == path or name.startswith(path + '.') for path in paths)
    ]


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in paths:
        if not any(path.startswith(other + '.') for other in kept):
            kept.append(path)
    return kept


def _is_a(model: nn.Module, path: str, kind: str) -> bool:
    return any(cls.__name__ == kind for cls in type(model.get_submodule(path)).__mro__)


def _nothing(model: nn.Module, at: str, path: str) -> ConfigError:
    """The path, as far as it goes, and what there is instead."""
    parts, known = _split(path), ''
    for part in parts:
        longer = f'{known}.{part}' if known else part
        if not _matching(model, longer):
            break
        known = longer
    anchors = _matching(model, known) if known else ['']
    names = list(dict(model.get_submodule(anchors[0]).named_children()))
    missing = part.strip('{}')
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.4)
    whole = [n for n, _ in model.named_modules() if n.split('.')[-1] == missing][:3]
    where = f'"{known}"' if known else f'the model ({type(model).__name__})'
    there = [name for name in names if name in close] or names[:12]
    more = f' and {len(names) - len(there)} more' if not close and len(names) > 12 else ''
    hint = f'{where} has {", ".join(there)}{more}' if there else f'{where} has no parts'
    if whole:
        hint += f'; {missing} is at {", ".join(whole)}'
    return ConfigError(f'at={at!r} names no module: {hint}')
