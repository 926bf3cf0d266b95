"""The files of an analysis, and how to write them: the old one or the new one, never half."""

import os
from pathlib import Path

EXPERTS_FILE = 'experts.json'
PAYLOAD_FILE = 'explorer.json'
REPORT_FILE = 'report.html'


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
