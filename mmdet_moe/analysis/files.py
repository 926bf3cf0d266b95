"""The files of an analysis, and how to write them: the old one or the new one, never half."""

import contextlib
import os
from pathlib import Path

from mmdet_moe.errors import ConfigError

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
    # A name of its own for each process; opened plainly, it gets the permissions of any new file.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"'{path}' cannot be written: {error.strerror}; once it can be, the same command goes "
            'on from here'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
