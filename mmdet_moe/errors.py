"""Errors that a user can mend: one sentence that names the place and the fix.

The command-line tools print the message alone, without a traceback, and exit with status 2.
"""


class UserError(Exception):
    """Base class."""


class ConfigError(UserError, ValueError):
    """Something in the config, the data or the checkpoint is wrong and the message says what."""


class NonFiniteRouterError(UserError, FloatingPointError):
    """A router produced NaN or infinite logits."""
