"""Turn an exception into one sentence, where it comes from a mistake that a user can mend."""

import difflib
import errno
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from mmengine.registry import Registry

import mmdet_moe.registry
from mmdet_moe.checks import fields_of
from mmdet_moe.errors import UserError

__all__ = ['explain', 'in_one_line']


def in_one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return ' '.join(str(text).split()) or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def explain(error: BaseException) -> str | None:
    """One sentence about a mistake that a user can mend, or None for anything else.

    Args:
        error: what building or running raised; its causes are looked at as well.
    """
    for describe in (
        _describe_config_error,
        _describe_unknown_name,
        _describe_wrong_argument,
        _describe_full_disk,
    ):
        for link in _chain(error):
            sentence = describe(link)
            if sentence is not None:
                return sentence
    return None


def _describe_config_error(error: BaseException) -> str | None:
    # A DataLoader worker hands its error on as text, the traceback included.
    text = str(error)
    if 'in DataLoader worker process' in text:
        lines = re.findall(r'^(?:[\w.]+\.)?ConfigError: (.+)$', text, re.MULTILINE)
        return lines[-1] if lines else None
    return in_one_line(error) if isinstance(error, UserError) else None


def _describe_full_disk(error: BaseException) -> str | None:
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    if not isinstance(error, OSError) or error.errno not in disk:
        return None
    what = f"'{error.filename}'" if error.filename else 'a file'
    return (
        f'{what} cannot be written: {error.strerror}; what was there before is whole: make room '
        'and run the command again, a training with --resume'
    )


def _describe_unknown_name(error: BaseException) -> str | None:
    """MMEngine raises KeyError, or RuntimeError for a name with a dot."""
    text = in_one_line(error)
    known = re.match(r'(\S+) is not in the (\S*?)::(.+?) registry', text)
    if isinstance(error, KeyError) and known:
        name, _, kind = known.groups()
    elif isinstance(error, RuntimeError) and (failed := re.fullmatch(r'Failed to get (\S+)', text)):
        name, kind = failed.group(1), _registry_kind(error)
    else:
        return None
    sentence = f"unknown type '{name}'" + (f' in the registry of {kind}s' if kind else '')
    if name.startswith('mmdet_moe.'):
        return sentence + _suggest(name.partition('.')[2], kind)
    return f'{sentence}: check its spelling, its scope prefix and custom_imports'


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _registry_kind(error: BaseException) -> str | None:
    """Name of the registry whose look-up failed."""
    for frame in reversed(_frames(error)):
        registry = frame.f_locals.get('self')
        if isinstance(registry, Registry):
            return registry.name
    return None


def _suggest(name: str, kind: str | None) -> str:
    """The close ones of the plugin's names, or else all of them."""
    registries = [item for item in vars(mmdet_moe.registry).values() if isinstance(item, Registry)]
    own = [item for item in registries if item.scope == mmdet_moe.registry.SCOPE]
    names: set[str] = set()
    for registry in own:
        if kind is None or registry.name == kind:
            registry.import_from_location()
            names.update(registry.module_dict)
    if not names:
        return '; mmdet_moe has no types of that kind'
    close = difflib.get_close_matches(name, sorted(names))
    if close:
        return '; did you mean ' + ' or '.join(f"'mmdet_moe.{item}'" for item in close) + '?'
    return '; mmdet_moe has ' + ', '.join(sorted(names))


_WRONG_CALL = re.compile(
    r'.*(got an unexpected keyword argument|missing \d+ required|got multiple values for|'
    r'takes no arguments)'
)


def _describe_wrong_argument(error: BaseException) -> str | None:
    """The fields of a config are not the arguments of the class it names, or it refuses a value."""
    text = in_one_line(error)
    if not isinstance(error, (TypeError, ValueError, KeyError, AssertionError)):
        return None
    frames = _frames(error)
    # MMEngine's `build_from_cfg`, and `build` of our registry.
    builders = [i for i, frame in enumerate(frames) if frame.f_locals.get('obj_cls') is not None]
    if not builders:
        return None
    built = frames[builders[-1]].f_locals['obj_cls']
    module = getattr(built, '__module__', '') or ''
    is_own = module.split('.')[0] == 'mmdet_moe'
    if not isinstance(error, TypeError) or not _WRONG_CALL.match(text):
        # Ours refuse in a way of their own: anything else is a bug in them.
        refused = not is_own and _all_constructors(built, frames[builders[-1] + 1 :])
        return f"wrong value for type '{built.__name__}': {text}" if refused and text else None
    # Deeper inside a foreign class it may be a bug there, for which the traceback is the answer.
    if not (is_own or _is_handed_on(built, frames[builders[-1] + 1 :], text)):
        return None
    prefix = 'mmdet_moe.' if is_own else ''
    return (
        f"wrong fields for type '{prefix}{built.__name__}': {text}{_accepted_fields(built, text)}"
    )


def _is_handed_on(built: Callable, frames: list[FrameType], text: str) -> bool:
    """Whether a call failed on its way from the builder up the constructors of the base classes.

    Args:
        built: What was built.
        frames: Those below the builder.
        text: The error's.
    """
    bases = inspect.getmro(built) if inspect.isclass(built) else ()
    # A constructor may also have called something else in a wrong way.
    called = re.search(r'(\w+)\.__init__\(\)', text)
    named = called is not None and called[1] in [base.__name__ for base in bases]
    return not frames or (named and _all_constructors(built, frames))


def _all_constructors(built: Callable, frames: list[FrameType]) -> bool:
    """Whether all frames, at least one, are constructors of a class and its base classes."""
    bases = inspect.getmro(built) if inspect.isclass(built) else ()
    codes = [getattr(base.__init__, '__code__', None) for base in bases]
    return bool(frames) and all(frame.f_code in codes for frame in frames)


def _accepted_fields(built: Callable, text: str) -> str:
    parameters = fields_of(built)
    unexpected = re.search(r"(?:(\w+)\.)?\w+\(\) got an unexpected keyword argument '(\w+)'", text)
    foreign = (
        unexpected
        and inspect.isclass(built)
        and (unexpected.group(1) not in {c.__name__ for c in inspect.getmro(built)})
    )
    if unexpected is None or foreign or not parameters:
        return ''
    close = difflib.get_close_matches(unexpected.group(2), parameters, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f'; it takes {", ".join(parameters)}'
