"""Writing files that are either the old or the new one, never half of one."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> Path:
    """Write or replace a file at once.

    Returns:
        The path.
    """
    # A name of its own for each process; opened plainly, it gets the permissions of any new file.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
