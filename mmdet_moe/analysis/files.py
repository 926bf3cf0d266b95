"""The files of an analysis, and how to write them: the old one or the new one, never half."""

from pathlib import Path

from mmdet_moe.errors import ConfigError
from mmdet_moe.files import replace_file

EXPERTS_FILE = 'experts.json'
PAYLOAD_FILE = 'explorer.json'
REPORT_FILE = 'report.html'


def write_file(path: Path, content: bytes) -> Path:
    """Write or replace a file at once.

    Returns:
        The path.

    Raises:
        ConfigError: It cannot be written: the disk is full, or nothing may be written there.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise ConfigError(
            f"'{path}' cannot be written: {error.strerror}; once it can be, the same command goes "
            'on from here'
        ) from error
    return path
