"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) as MMPretrain's ``FashionMNIST`` reads it.

That is four uncompressed idx files under their own names in one folder. They come from the official
server or from a folder that has them already, plain or gzipped; what counts is their content, whose
MD5 does not depend on how it was compressed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchvision.datasets import FashionMNIST

from mmdet_moe.datasets.download import Archive, check_disk_space, fetch, md5_of
from mmdet_moe.datasets.idx import SPLITS, check_pair, find_idx, parse_idx, read_content
from mmdet_moe.errors import ConfigError
from mmdet_moe.files import scratch_folder

CLASSES = tuple(FashionMNIST.classes)
URL_BASE = FashionMNIST.mirrors[0].rstrip('/')
#: Sizes in bytes of the files of the server, and of what is in them.
_SIZES = {
    'train-images-idx3-ubyte.gz': (26_421_880, 47_040_016),
    'train-labels-idx1-ubyte.gz': (29_515, 60_008),
    't10k-images-idx3-ubyte.gz': (4_422_102, 7_840_016),
    't10k-labels-idx1-ubyte.gz': (5_148, 10_008),
}
#: The files of the server, by the name of what is in them.
ARCHIVES = {
    (content := name.removesuffix('.gz')): Archive(name, md5, *_SIZES[name], {content: None})
    for name, md5 in FashionMNIST.resources
}
#: MD5 of the uncompressed content.
CONTENT_MD5 = {
    'train-images-idx3-ubyte': 'f4a8712d7a061bf5bd6d2ca38dc4d50a',
    'train-labels-idx1-ubyte': '9018921c3c673c538a1fc5bad174d6f9',
    't10k-images-idx3-ubyte': '8181f5470baa50b63fa0f6fddb340f0a',
    't10k-labels-idx1-ubyte': '15d484375f8d13e6eb1aabb0c3f46965',
}


def prepare_fashion_mnist(
    out: str | Path,
    source: str | Path | None = None,
    url_base: str = URL_BASE,
    remove_archives: bool = False,
    overwrite: bool = False,
) -> dict[str, int] | None:
    """Put the four idx files into ``out``, all verified before the first gets its name.

    Args:
        out: folder to fill.
        source: folder that has the files already, plain or with ``.gz``; None downloads them.
        url_base: where the ``.gz`` files are on a server.
        remove_archives: delete the downloaded files once all is written.
        overwrite: replace files in ``out`` that are not those of Fashion-MNIST.

    Returns:
        Number of images of the splits 'train' and 'test'; None when all was there already.

    Raises:
        ConfigError: a file is missing, damaged, not the one of Fashion-MNIST or does not belong to
            its partner, ``out`` has other files under these names, or a download fails as in
            :func:`mmdet_moe.datasets.download.prepare`.
    """
    out = Path(out)
    to_write = [name for name in CONTENT_MD5 if not _is_there(out / name, overwrite)]
    if not to_write:
        return None
    files = {name: out / name for name in CONTENT_MD5 if name not in to_write}
    if source is None:
        files |= _download(out, to_write, url_base)
    else:
        files |= {name: find_idx(source, name) for name in to_write}
    fix = 'delete it, and the command downloads it again' if source is None else 'get it again'
    contents, num_images = _read_verified(files, fix)
    _write(out, {name: contents[name] for name in to_write})
    if source is None and remove_archives:
        for name in to_write:
            files[name].unlink()
    return num_images


def _download(out: Path, names: list[str], url_base: str) -> dict[str, Path]:
    """Paths of the ``.gz`` files in ``out`` by their idx names, after downloading what is missing.

    One that was put there by hand is taken as it is, because its content is verified anyway: a
    distribution's package compresses the same content in its own way.
    """
    paths = {name: out / ARCHIVES[name].name for name in names}
    missing = [ARCHIVES[name] for name, path in paths.items() if not path.exists()]
    check_disk_space([ARCHIVES[name] for name in names], out)
    for archive in missing:
        out.mkdir(parents=True, exist_ok=True)
        fetch(archive, out, url_base)
    return paths


def _is_there(path: Path, overwrite: bool) -> bool:
    if not path.exists():
        return False
    if md5_of(path) == CONTENT_MD5[path.name]:
        return True
    if overwrite:
        return False
    raise ConfigError(
        f"{path} is there already and is not Fashion-MNIST's: move it away, choose another --out, "
        'or replace it with --overwrite'
    )


def _read_verified(files: dict[str, Path], fix: str) -> tuple[dict[str, bytes], dict[str, int]]:
    """Contents of the files by their idx names, and the number of images of each split."""
    contents = {name: read_content(path, fix) for name, path in files.items()}
    num_images = {}
    for split, (images_name, labels_name) in zip(('train', 'test'), SPLITS, strict=True):
        images = parse_idx(contents[images_name], 3, files[images_name], fix)
        labels = parse_idx(contents[labels_name], 1, files[labels_name], fix)
        check_pair(images, labels, len(CLASSES), files[images_name], files[labels_name])
        num_images[split] = len(images)
    # The checks above say better what is wrong, so the one that covers them comes last.
    for name, content in contents.items():
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != CONTENT_MD5[name]:
            raise ConfigError(
                f'the content of {files[name]} has the MD5 {found} instead of '
                f"{CONTENT_MD5[name]}: it is not Fashion-MNIST's, or damaged: {fix}"
            )
    return contents, num_images


def _write(out: Path, contents: dict[str, bytes]) -> None:
    """Write all files under other names, then give them their own."""
    with scratch_folder(out / '.writing') as scratch:
        for name, content in contents.items():
            (scratch / name).write_bytes(content)
        for name in contents:
            (scratch / name).replace(out / name)
