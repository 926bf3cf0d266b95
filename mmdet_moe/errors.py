"""Errors that a user can mend: one sentence that names the field and the fix."""


class ConfigError(ValueError):
    """Something in the config, the data or the checkpoint is wrong and the message says what.

    The command-line tools print the message alone, without a traceback, and exit with status 2.
    """
