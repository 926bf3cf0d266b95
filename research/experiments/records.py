"""What finished runs measured, kept in the repository when their folders are gone.

One JSON file for each experiment and budget. A run's record has its figures, those parts of its
analyses that tables and pictures read, a fingerprint of its settings
(:func:`~research.experiments.settings.fingerprint`), and the machine.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from mmengine.device import get_device

from mmdet_moe.analysis.files import write_file
from mmdet_moe.compat.amp import has_bfloat16
from mmdet_moe.datasets import class_folders, coco_folder
from mmdet_moe.errors import ConfigError
from research.benchmarks.environment import environment
from research.runs import REPOSITORY

RECORDS = REPOSITORY / 'research' / 'records'
#: Under what the records' ``data`` have :func:`data_digest`.
DIGEST = 'digest'
#: Of the files that say what is on the images, or hold them all.
_SUFFIXES = ('', '.json', '.meta', '.gz')


def data_digest(folder: Path) -> str | None:
    """Of the annotations of a data set, or its arrays; None where it is not there or not known."""
    return _digest(folder) if folder.is_dir() else None


@cache
def _digest(folder: Path) -> str | None:
    digest, found = hashlib.sha256(), False
    for path in sorted([*folder.glob('*'), *folder.glob('*/*')]):
        if path.name == class_folders.NOTE:
            return None  # the same images as the published files have, in other bytes
        # Where the data come from may be told in other words.
        is_other = path.name == coco_folder.NOTE or path.name.endswith('.tar.gz')
        if path.suffix not in _SUFFIXES or is_other or not path.is_file():
            continue
        found = True
        digest.update(path.relative_to(folder).as_posix().removesuffix('.gz').encode())
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16] if found else None


def pick(content: Any, wanted: Sequence[str]) -> Any:
    """Some parts of the content of a JSON file.

    Args:
        content: Dicts, lists and plain values.
        wanted: Keys on the way to each part, ``'a/b/c'``; ``*`` is every key, and the items of a
            list are taken without a key.
    """
    if isinstance(content, list):
        return [pick(item, wanted) for item in content]
    if not isinstance(content, Mapping):
        return content
    kept = {}
    for key, value in content.items():
        parts = (path.partition('/') for path in wanted)
        if rest := [tail for head, _, tail in parts if head in (key, '*')]:
            kept[key] = value if '' in rest else pick(value, rest)
    return kept


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The content of a file of records, empty for none.

    Returns:
        ``'runs'``: by folder below the work directory, ``'settings'``, ``'result'`` (the fields of
        :class:`~research.runs.RunResult`), ``'files'`` (what is kept of a run's files, by name),
        and ``'trained_on'``, or ``'recorded_on'`` of a run that was found in its work directory.
        ``'data'``: what the tables say of the data set.

    Raises:
        ConfigError: It is no JSON.
    """
    if not path.exists():
        return {'data': {}, 'runs': {}}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"'{path}' is no JSON ({error}); mend it, or get it back with `git checkout`"
        ) from error


def add_records(path: Path, runs: Mapping[str, dict], data: Mapping[str, Any]) -> None:
    """Write records into a file, which other processes may do at the same time.

    Of a run that is recorded already, with the same settings and figures, the machine stays, and
    what is kept of other files: they may come from another machine.

    Args:
        path: Of the file.
        runs, data: As :func:`read_records` returns them.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f'.{path.name}.lock')):
        content = read_records(path)
        before = _text(content)
        content['data'].update(data)
        for name, new in runs.items():
            old = content['runs'].get(name, {})
            if all(_text(old.get(key)) == _text(new[key]) for key in ('settings', 'result')):
                old['files'].update(new['files'])
            else:
                content['runs'][name] = new
        content['runs'] = dict(sorted(content['runs'].items()))
        if (text := _text(content)) != before:
            write_file(path, text.encode())


def _text(content: Any) -> str:
    """JSON with a line for each field and each list of plain values, so that a diff is readable.

    Keys stay in their order: that of the layers is the one of the tables.
    """
    text = json.dumps(content, indent=1)
    return re.sub(r'\[\n[^][{}]*\n *\]', lambda found: ' '.join(found[0].split()), text) + '\n'


@cache
def machine() -> dict[str, Any]:
    """What the times of a run, and in the last digits its figures, depend on."""
    found = environment(torch.device(get_device()))
    versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    kept = {key: found[key] for key in ('commit', 'cpu', 'device')} | {'versions': versions}
    # Runs "in mixed precision" are in float32 on a processor without bfloat16.
    return kept | {'bfloat16': has_bfloat16()} if get_device() == 'cpu' else kept
