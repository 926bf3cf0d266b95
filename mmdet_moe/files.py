"""Files that are the old one or the new one, never half, whenever a process is killed."""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LEFT_OVER = re.compile(r'\..+\.\d+\.tmp')


def replace_file(path: str | Path, content: bytes) -> None:
    """Write or replace a file at once.

    Raises:
        OSError: It cannot be written; its ``filename`` is the path, and what was there still is.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():  # such as /dev/null, which must not become a file
        path.write_bytes(content)
        return
    # A name of its own for each process; opened plainly, it gets the permissions of any new file.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may keep the name without content
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Any]) -> Path:
    """Write a file of weights at once, with its folder; give its path."""
    import torch  # which takes seconds, and what only asks for paths does not need

    content = io.BytesIO()
    torch.save(weights, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())
    return path


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for what is not whole yet; what is in it at the end is deleted, and so are
    the folders above that were made for it and hold nothing else."""
    shutil.rmtree(path, ignore_errors=True)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for folder in made[1:]:
                folder.rmdir()


def remove_left_overs(folder: str | Path) -> None:
    """Remove what killed processes had begun to write into a folder, but not below it."""
    for path in Path(folder).glob('.*.tmp'):
        if _LEFT_OVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
