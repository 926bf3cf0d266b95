"""Download, verify and unpack COCO 2017 and CIFAR to where the configs look for them.

A download continues where it was interrupted, in this run or an earlier one: it goes into a
``.part`` file, which gets its name only after its MD5 is right. An archive is unpacked into a
scratch folder, and its folders move into place only when everything in it was read and matched its
checksums. The archives stay beside the unpacked data unless asked otherwise.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from mmdet_moe.errors import ConfigError
from mmdet_moe.files import scratch_folder
from mmdet_moe.progress import progress_bar


@dataclass(frozen=True)
class Archive:
    """One archive on a server.

    Attributes:
        path: its path below the server's base URL.
        md5: MD5 of the archive, in hexadecimal.
        num_bytes: its exact size.
        unpacked_bytes: about what its content takes on disk.
        provides: paths below the output folder that tell that it is unpacked. The number of files
            for a folder; for a file its MD5, or None to be content with any file.
    """

    path: str
    md5: str
    num_bytes: int
    unpacked_bytes: int
    provides: Mapping[str, int | str | None]

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.path).name


COCO_URL_BASE = 'http://images.cocodataset.org'
COCO_SPLITS = {
    'train2017': Archive(
        path='zips/train2017.zip',
        md5='cced6f7f71b7629ddf16f17bbcfab6b2',
        num_bytes=19_336_861_798,
        unpacked_bytes=19_500_000_000,
        provides={'train2017': 118_287},
    ),
    'val2017': Archive(
        path='zips/val2017.zip',
        md5='442b8da7639aecaf257c1dceb8ba8c80',
        num_bytes=815_585_330,
        unpacked_bytes=830_000_000,
        provides={'val2017': 5_000},
    ),
}
COCO_ANNOTATIONS = Archive(
    path='annotations/annotations_trainval2017.zip',
    md5='f4bbac642086de4f52a3fdda2de5fa2c',
    num_bytes=252_907_541,
    unpacked_bytes=900_000_000,
    provides={
        'annotations/instances_train2017.json': None,
        'annotations/instances_val2017.json': None,
    },
)

CIFAR_URL_BASE = 'https://www.cs.toronto.edu/~kriz'


def _cifar(published: type[CIFAR10], num_bytes: int) -> Archive:
    meta = (published.meta['filename'], published.meta['md5'])
    files = dict([*published.train_list, *published.test_list, meta])
    return Archive(
        path=published.filename,
        md5=published.tgz_md5,
        num_bytes=num_bytes,
        unpacked_bytes=187_000_000,
        provides={f'{published.base_folder}/{name}': md5 for name, md5 in files.items()},
    )


CIFAR = {'cifar10': _cifar(CIFAR10, 170_498_071), 'cifar100': _cifar(CIFAR100, 169_001_437)}

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
# Pauses before the attempts that follow an interruption. A download that never began fails at once.
_RETRY_PAUSES = (1.0, 5.0, 20.0)


def prepare_coco(
    out: str | Path,
    splits: Sequence[str] = tuple(COCO_SPLITS),
    url_base: str = COCO_URL_BASE,
    remove_archives: bool = False,
) -> list[str]:
    """Get COCO 2017's annotations and the images of some splits.

    Args:
        out: folder that gets ``train2017``, ``val2017`` and ``annotations``.
        splits: names out of 'train2017' and 'val2017'.
        url_base: where ``zips/`` and ``annotations/`` are.
        remove_archives: delete every zip once it is unpacked.

    Returns:
        File names of the archives that were unpacked; empty when all was there already.

    Raises:
        ConfigError: see :func:`prepare`.
    """
    unknown = [split for split in splits if split not in COCO_SPLITS]
    if unknown:
        raise ConfigError(f'splits must be out of {", ".join(COCO_SPLITS)}, not {unknown[0]!r}')
    # The annotations come first: they are small, so a bad connection or mirror shows early.
    archives = [COCO_ANNOTATIONS, *(COCO_SPLITS[split] for split in dict.fromkeys(splits))]
    return prepare(archives, out, url_base, remove_archives)


def prepare_cifar(
    name: str, out: str | Path, url_base: str = CIFAR_URL_BASE, remove_archives: bool = False
) -> list[str]:
    """Get ``out/cifar-10-batches-py`` or ``out/cifar-100-python``; else as :func:`prepare_coco`.

    Args:
        name: 'cifar10' or 'cifar100'.
        out: folder that gets that folder.
        url_base: where the archive is.
        remove_archives: delete the archive once it is unpacked.
    """
    return prepare([CIFAR[name]], out, url_base, remove_archives)


def prepare(
    archives: Sequence[Archive], out: str | Path, url_base: str, remove_archives: bool = False
) -> list[str]:
    """Download, verify and unpack those archives whose content is not in ``out`` yet.

    An archive that already lies in ``out`` under its own name is used instead of a download.

    Args:
        archives: what to get.
        out: folder for the archives and for their content.
        url_base: URL that the archives' paths are appended to.
        remove_archives: delete every archive once it is unpacked.

    Returns:
        File names of the archives that were unpacked.

    Raises:
        ConfigError: the server cannot be reached or serves something else, an archive is damaged,
            a folder is there in part, or the disk is too small.
    """
    out = Path(out)
    missing = [archive for archive in archives if not is_unpacked(archive, out)]
    check_disk_space(missing, out)
    for archive in missing:
        out.mkdir(parents=True, exist_ok=True)
        file = fetch(archive, out, url_base)
        unpack(archive, file)
        if remove_archives:
            file.unlink()
    return [archive.name for archive in missing]


def is_unpacked(archive: Archive, out: Path) -> bool:
    """Whether all that an archive provides is in ``out``.

    Raises:
        ConfigError: a folder is there with too few files in it, as after an interrupted unzip, or a
            file with another content.
    """
    complete = True
    for path, expected in archive.provides.items():
        target = out / path
        if isinstance(expected, int):
            if target.is_dir():
                _check_number_of_files(target, expected)
            else:
                complete = False
        elif target.is_file():
            found = md5_of(target) if expected is not None else None
            if found != expected:
                raise ConfigError(
                    f'{target} has the MD5 {found} instead of {expected}, so it is incomplete, '
                    'damaged or something else: delete it and run the command again'
                )
        else:
            complete = False
    return complete


def _check_number_of_files(folder: Path, expected: int) -> None:
    found = sum(1 for _ in os.scandir(folder))
    if found < expected:
        raise ConfigError(
            f'{folder} holds {found} of {expected} files: move it away and run the command again'
        )


def check_disk_space(archives: Sequence[Archive], out: Path) -> None:
    """Complain if the archives and their content do not fit on the disk of ``out``.

    Raises:
        ConfigError: there is less room than what is not downloaded yet takes.
    """
    needed = 0
    for archive in archives:
        here = max(_size(out / archive.name), _size(_part(out / archive.name)))
        needed += archive.unpacked_bytes + max(0, archive.num_bytes - here)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f'{out} needs {needed / 1e9:.1f} GB more but its disk has {free / 1e9:.1f} GB free: '
            'make room or choose another --out'
        )


def fetch(archive: Archive, out: Path, url_base: str) -> Path:
    """Put a verified archive into ``out`` and return its path.

    Raises:
        ConfigError: it cannot be downloaded, or its size or MD5 is wrong.
    """
    target = out / archive.name
    if target.exists():
        found = md5_of(target)
        if found != archive.md5:
            raise ConfigError(
                f'{target} has the MD5 {found} instead of {archive.md5}: delete it, and the '
                'command downloads it again'
            )
        return target

    url = f'{url_base.rstrip("/")}/{archive.path}'
    part = _part(target)
    # A part of the full size comes from a run that ended before the rename below.
    if _size(part) != archive.num_bytes:
        _download(url, part, archive.num_bytes)
    found = md5_of(part)
    if found != archive.md5:
        part.unlink()
        raise ConfigError(
            f'{url} came with the MD5 {found} instead of {archive.md5}, so it was deleted: run the '
            'command again, or choose another server with --url-base'
        )
    part.rename(target)
    return target


def md5_of(path: str | Path, progress: bool = True) -> str:
    """MD5 of a file, in hexadecimal, with a progress bar if asked for."""
    path, md5 = Path(path), hashlib.md5(usedforsecurity=False)
    bar = _byte_bar(f'verify {path.name}', _size(path), hidden=not progress)
    with path.open('rb') as file, bar:
        while chunk := file.read(_CHUNK_BYTES):
            md5.update(chunk)
            bar.update(len(chunk))
    return md5.hexdigest()


def _part(target: Path) -> Path:
    return target.with_name(f'{target.name}.part')


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _byte_bar(description: str, total: int, initial: int = 0, hidden: bool = False) -> tqdm:
    size = dict(total=total, initial=initial, unit='B', unit_scale=True, unit_divisor=1000)
    return progress_bar(desc=description, hidden=hidden, **size)


def _download(url: str, part: Path, num_bytes: int) -> None:
    """Fill ``part`` up to ``num_bytes``, over as many connections as it takes.

    Raises:
        ConfigError: nothing more comes.
    """
    farthest = _size(part)
    # Only a transfer that has worked is worth waiting for, so the first failure is final.
    stalls = len(_RETRY_PAUSES)
    while True:
        reason = 'the connection was closed early'
        try:
            _transfer(url, part, num_bytes)
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, 'reason', error)) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError):
                reason = f'HTTP {error.code} {reason}'
        reached = _size(part)
        if reached == num_bytes:
            return
        stalls = 0 if reached > farthest else stalls + 1
        farthest = max(farthest, reached)
        if stalls >= len(_RETRY_PAUSES):
            kept = f' ({reached} bytes are kept and a further run continues)' if reached else ''
            raise ConfigError(
                f'cannot download {url}: {reason}{kept}; check the connection and run the command '
                f'again, or download the file by other means and put it at {part.with_suffix("")}'
            )
        time.sleep(_RETRY_PAUSES[stalls])


def _transfer(url: str, part: Path, num_bytes: int) -> None:
    """One connection: append to ``part``, or write it anew if the server ignores ranges."""
    start = _size(part)
    if start > num_bytes:
        part.unlink()
        start = 0
    request = urllib.request.Request(url, headers={'User-Agent': 'mmdet_moe'})
    if start:
        request.add_header('Range', f'bytes={start}-')
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        total = _total_bytes(response, start if resumed else 0)
        if total not in (None, num_bytes):
            # Before part is touched: it may be a login page in place of the file.
            raise ConfigError(
                f'{url} is a file of {total} bytes, not of {num_bytes}: it is something else, so '
                'check the connection, or choose another server with --url-base'
            )
        bar = _byte_bar(part.stem, num_bytes, initial=start if resumed else 0)
        with part.open('ab' if resumed else 'wb') as file, bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))


def _total_bytes(response: http.client.HTTPResponse, start: int) -> int | None:
    """Size of the whole file by the response's headers, None where they do not tell it.

    Raises:
        OSError: the server sends another range than the one from ``start``.
    """
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        length = response.headers.get('Content-Length')
        return int(length) if length is not None else None
    content_range = response.headers.get('Content-Range', '')
    match = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', content_range.strip())
    if match is None or int(match[1]) != start:
        raise OSError(f'asked for the bytes from {start}, the server sends {content_range!r}')
    return None if match[2] == '*' else int(match[2])


def unpack(archive: Archive, file: str | Path) -> None:
    """Unpack a zip or tar.gz file into its own folder, whole or not at all.

    Files that are there already under the same name stay as they are.

    Raises:
        ConfigError: the file is damaged, holds paths that lead out of the folder or members that
            are neither files nor folders, or lacks what the archive should provide.
    """
    file = Path(file)
    with scratch_folder(file.with_name(f'.{file.name}.unpacking')) as scratch:
        try:
            _unpack_into(scratch, file)
        except _DAMAGED as error:
            raise ConfigError(
                f'{file} is damaged ({error}): delete it, and the command downloads it again'
            ) from error
        if not all((scratch / path).exists() for path in archive.provides):
            raise ConfigError(f'{file} lacks some of {", ".join(archive.provides)}')
        _move_missing(scratch, file.parent, [scratch / path for path in archive.provides])


def _unpack_into(folder: Path, file: Path) -> None:
    is_zip = file.suffix == '.zip'
    with (zipfile.ZipFile if is_zip else tarfile.open)(file) as archive:
        # No owners and special bits; Python has it since 3.12, and in the later patches before.
        archive.extraction_filter = getattr(tarfile, 'data_filter', None)
        members = archive.infolist() if is_zip else archive
        for member in progress_bar(members, desc=f'unpack {file.name}', unit='file'):
            name = member.filename if is_zip else member.name
            path = PurePosixPath(name)
            if path.is_absolute() or '..' in path.parts or '\\' in name or ':' in name:
                raise ConfigError(
                    f'{file} holds {name!r}, a path out of its folder: it is not safe'
                )
            if not (is_zip or member.isfile() or member.isdir()):
                raise ConfigError(f'{file} holds {name!r}, a link or device: it is not safe')
            # This reads to the end, where zipfile and gzip compare their CRCs.
            archive.extract(member, folder)


def _move_missing(source: Path, target: Path, last: Collection[Path]) -> None:
    # What tells that all is there comes last: this may be interrupted.
    for entry in sorted(
        source.iterdir(), key=lambda of: (any(p.is_relative_to(of) for p in last), of)
    ):
        there = target / entry.name
        if not there.exists():
            entry.rename(there)
        elif entry.is_dir():
            _move_missing(entry, there, last)
