"""What the passes over a data set leave on disk: a file for every few images.

An interrupted pass goes on behind the last complete file, and nothing but one file's images is ever
in memory.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.records.contents import from_arrays, kind_of_part, to_arrays
from mmdet_moe.compat.distributed import note
from mmdet_moe.errors import ConfigError

T = TypeVar('T')
PLAN_FILE = 'plan.json'


class RecordFiles(Generic[T]):
    """The records of one pass.

    Args:
        kind: What a file holds, as :func:`~mmdet_moe.analysis.records.contents.from_arrays` wants
            it.
        folder: Where they are; made if it does not exist.
        plan: What identifies the pass, JSON-able. Records of another plan are never mixed in.
        overwrite: Remove records of another plan instead of refusing.

    Raises:
        ConfigError: If the folder holds records of another plan.
    """

    def __init__(self, kind: type[T], folder: Path, plan: dict, overwrite: bool = False) -> None:
        self.kind = kind
        self.folder = folder
        content = json.dumps(plan, indent=2, sort_keys=True).encode()
        path = folder / PLAN_FILE
        if path.exists() and path.read_bytes() != content:
            if not overwrite:
                raise ConfigError(
                    f'{folder.parent} holds the analysis of another model, config or selection of '
                    'images; choose another folder with --out, or replace it with --overwrite'
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, content)
        for *_, damaged in filter(lambda file: not _is_whole(file[-1]), self._files()):
            note(f'{damaged} is damaged; its images are looked at again')
            damaged.unlink()

    @property
    def num_images(self) -> int:
        """Images recorded without a gap."""
        done = 0
        for first, end, _ in self._files():
            if first != done:
                break
            done = end
        return done

    def write(self, first: int, end: int, records: T) -> None:
        """Add the images ``first`` to ``end - 1``, in place of those of them that are there."""
        for begins, ends, path in self._files():
            if begins < end and first < ends:  # behind a damaged file that was removed
                path.unlink()
        buffer = io.BytesIO()
        np.savez(buffer, **to_arrays(records))
        write_file(self.folder / f'{first:08d}-{end:08d}.npz', buffer.getvalue())

    def __iter__(self) -> Iterator[T]:
        """The records of each file, in the order of the images."""
        for _, _, path in self._files():
            with np.load(path) as file:
                yield from_arrays(self.kind, dict(file))

    def part(self, name: str) -> Iterator[Any]:
        """One field of each file's records, or one item of its list; nothing else is read."""
        for _, _, path in self._files():
            with np.load(path) as file:
                arrays = {
                    rest: file[key]
                    for key in file.files
                    for first, _, rest in [key.partition('/')]
                    if first == name
                }
            yield from_arrays(kind_of_part(self.kind, name), arrays)

    def _files(self) -> list[tuple[int, int, Path]]:
        return sorted(
            (*map(int, path.stem.split('-')), path) for path in self.folder.glob('*-*.npz')
        )


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False
