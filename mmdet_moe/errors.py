"""Errors that a user can mend: one sentence that names the place and the fix.

The command-line tools print the message alone, without a traceback, and exit with status 2.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Base class."""


class ConfigError(UserError, ValueError):
    """Something in the config, the data or the checkpoint is wrong and the message says what."""


class ReplacedAttributeError(ConfigError, AttributeError):
    """A model reads of an MoE layer what only the dense layer in its place had."""


class NonFiniteRouterError(UserError, FloatingPointError):
    """A router produced NaN or infinite logits."""


@contextmanager
def explained(message: str) -> Iterator[None]:
    """What goes wrong in the body becomes a :class:`ConfigError`, with its own message at the end.

    Errors that say enough already, and lack of memory, stay what they are.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of any kind: the body is the user's
        if 'OutOfMemory' in type(error).__name__:
            raise
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise ConfigError(f'{message} ({reason})') from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a :class:`UserError` of the body as one line and exit with status 2."""
    try:
        yield
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2) from None
