"""CIFAR-10 and CIFAR-100 from a folder of images for each class, as several copies of them come.

``train/<class>/*.png`` and ``test/<class>/*.png`` become the files that MMPretrain's ``CIFAR10``
and ``CIFAR100`` read. The order of the published files is not to be had from such a folder, so
their checksums differ; a note beside them holds their own, by which ``mmdet_moe.CIFAR10`` and
``mmdet_moe.CIFAR100`` know them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import CIFAR10, CIFAR100

from mmdet_moe.datasets.download import CIFAR, is_unpacked, md5_of
from mmdet_moe.errors import ConfigError
from mmdet_moe.files import scratch_folder
from mmdet_moe.progress import progress_bar

#: Name of the note: checksums by file, as JSON.
NOTE = 'made_from_class_folders.json'
#: What Pillow calls formats that keep every pixel.
LOSSLESS = ('PNG', 'BMP', 'PPM')
SIZE = 32
#: The 20 coarse classes of CIFAR-100 (Krizhevsky 2009), fine names as MMPretrain writes them.
COARSE_CLASSES = {
    'aquatic mammals': ('beaver', 'dolphin', 'otter', 'seal', 'whale'),
    'fish': ('aquarium_fish', 'flatfish', 'ray', 'shark', 'trout'),
    'flowers': ('orchid', 'poppy', 'rose', 'sunflower', 'tulip'),
    'food containers': ('bottle', 'bowl', 'can', 'cup', 'plate'),
    'fruit and vegetables': ('apple', 'mushroom', 'orange', 'pear', 'sweet_pepper'),
    'household electrical devices': ('clock', 'keyboard', 'lamp', 'telephone', 'television'),
    'household furniture': ('bed', 'chair', 'couch', 'table', 'wardrobe'),
    'insects': ('bee', 'beetle', 'butterfly', 'caterpillar', 'cockroach'),
    'large carnivores': ('bear', 'leopard', 'lion', 'tiger', 'wolf'),
    'large man-made outdoor things': ('bridge', 'castle', 'house', 'road', 'skyscraper'),
    'large natural outdoor scenes': ('cloud', 'forest', 'mountain', 'plain', 'sea'),
    'large omnivores and herbivores': ('camel', 'cattle', 'chimpanzee', 'elephant', 'kangaroo'),
    'medium-sized mammals': ('fox', 'porcupine', 'possum', 'raccoon', 'skunk'),
    'non-insect invertebrates': ('crab', 'lobster', 'snail', 'spider', 'worm'),
    'people': ('baby', 'boy', 'girl', 'man', 'woman'),
    'reptiles': ('crocodile', 'dinosaur', 'lizard', 'snake', 'turtle'),
    'small mammals': ('hamster', 'mouse', 'rabbit', 'shrew', 'squirrel'),
    'trees': ('maple_tree', 'oak_tree', 'palm_tree', 'pine_tree', 'willow_tree'),
    'vehicles 1': ('bicycle', 'bus', 'motorcycle', 'pickup_truck', 'train'),
    'vehicles 2': ('lawn_mower', 'rocket', 'streetcar', 'tank', 'tractor'),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What a published data set is known to hold.

    Attributes:
        classes: Names in the order of the labels, which is alphabetical.
        per_class: Images of each class by split.
        means: Mean of the training images' red, green and blue in 0..255, to three decimals; the
            usual 0.4914, 0.4822 and 0.4465 of CIFAR-10 are off by up to 0.011.
        folder: Of the files, below the root of the data set.
        files: Names of the files by split; a split is divided evenly among them.
        meta: Name of the file with the classes, and of its entry.
        labels: Name of the labels' entry.
    """

    classes: tuple[str, ...]
    per_class: Mapping[str, int]
    means: tuple[float, float, float]
    folder: str
    files: Mapping[str, tuple[str, ...]]
    meta: tuple[str, str]
    labels: str


def _published(
    cls: type[CIFAR10], classes: Sequence[str], sizes: tuple[int, int], means: tuple, labels: str
) -> Published:
    files = {
        split: tuple(name for name, _ in listed)
        for split, listed in (('train', cls.train_list), ('test', cls.test_list))
    }
    meta = (cls.meta['filename'], cls.meta['key'])
    per_class = dict(zip(('train', 'test'), sizes, strict=True))
    return Published(tuple(classes), per_class, means, cls.base_folder, files, meta, labels)


_CLASSES_10 = 'airplane automobile bird cat deer dog frog horse ship truck'
_CLASSES_100 = sorted(chain.from_iterable(COARSE_CLASSES.values()))
PUBLISHED = {
    'cifar10': _published(
        CIFAR10, _CLASSES_10.split(), (5000, 1000), (125.307, 122.950, 113.865), 'labels'
    ),
    'cifar100': _published(
        CIFAR100, _CLASSES_100, (500, 100), (129.304, 124.070, 112.434), 'fine_labels'
    ),
}


def prepare_from_classes(name: str, source: str | Path, out: str | Path) -> dict[str, int] | None:
    """Write ``out/cifar-10-batches-py`` or ``out/cifar-100-python`` from a folder of images.

    The images of a split go round the classes, each class in the order of the file names, so that
    the first images of the data set show every class.

    Args:
        name: 'cifar10' or 'cifar100'.
        source: Folder with ``train/<class>/`` and ``test/<class>/``, of lossless images.
        out: Root of the data set.

    Returns:
        Number of images of the splits 'train' and 'test'; None when all was there already.

    Raises:
        ConfigError: A folder, class or image is missing or too much, an image is lossy, unreadable
            or not of 32×32 pixels, the pixels are not those of the published data set, or ``out``
            holds something else.
    """
    published, source = PUBLISHED[name], Path(source)
    folder = Path(out) / published.folder
    if _is_there(name, folder):
        return None
    files = {split: _files(published, source, split) for split in published.files}
    images = {split: _read(of_split, split) for split, of_split in files.items()}
    means = images['train'].reshape(-1, 3, SIZE * SIZE).mean((0, 2))
    if not np.allclose(means, published.means, atol=2e-3):
        shown = [', '.join(f'{mean:.3f}' for mean in of) for of in (means, published.means)]
        raise ConfigError(
            f"{source}: the training images' mean colour is {shown[0]} and not {shown[1]}, so they "
            f'are not the pixels of {name}: they were changed, or stored with loss before'
        )
    _write(published, folder, files, images)
    return {split: len(of_split) for split, of_split in files.items()}


def _is_there(name: str, folder: Path) -> bool:
    if not folder.exists():
        return False
    if (noted := checksums(folder)) is None:
        if is_unpacked(CIFAR[name], folder.parent):
            return True
        raise ConfigError(f'{folder} is there in part: move it away and run the command again')
    for file, md5 in noted.items():
        path = folder / file
        if not path.is_file() or md5_of(path) != md5:
            raise ConfigError(
                f'{path} is missing or damaged: delete {folder} and run the command again'
            )
    return True


def checksums(folder: str | Path) -> dict[str, str] | None:
    """MD5 of each file that :func:`prepare_from_classes` wrote into a folder; None for others."""
    note = Path(folder) / NOTE
    return json.loads(note.read_text()) if note.is_file() else None


def _files(published: Published, source: Path, split: str) -> list[Path]:
    """The image files of a split, going round the classes."""
    folder = source / split
    if not folder.is_dir():
        raise ConfigError(f"--source {source}: there is no folder '{split}' in it")
    found = {path.name for path in folder.iterdir() if path.is_dir()}
    missing, unknown = set(published.classes) - found, found - set(published.classes)
    if missing or unknown:
        word, names = ('lacks the class', missing) if missing else ('has an unknown class', unknown)
        raise ConfigError(
            f'{folder} {word} {min(names)!r}: it needs one folder for each of the '
            f'{len(published.classes)} classes, named as in {", ".join(published.classes[:3])}, ...'
        )
    by_class = []
    for name in published.classes:
        of_class = sorted(
            path for path in (folder / name).iterdir() if not path.name.startswith('.')
        )
        if len(of_class) != published.per_class[split]:
            raise ConfigError(
                f'{folder / name} holds {len(of_class)} files and not the '
                f'{published.per_class[split]} images of a class: get the data set again'
            )
        by_class.append(of_class)
    return [path for of_all in zip(*by_class, strict=True) for path in of_all]


def _read(files: Sequence[Path], split: str) -> np.ndarray:
    """Images as rows of 3 · 32 · 32 uint8: all of red, then green, then blue."""
    images = np.empty((len(files), 3 * SIZE * SIZE), np.uint8)
    for row, path in enumerate(progress_bar(files, desc=f'read {split}', unit='image')):
        try:
            with Image.open(path) as image:
                if image.format not in LOSSLESS:
                    raise ConfigError(
                        f'{path} is stored as {image.format}, which changes pixels: results would '
                        f'not be those of the data set, so use a lossless copy (PNG)'
                    )
                if image.size != (SIZE, SIZE):
                    shape = '×'.join(map(str, image.size))
                    raise ConfigError(f'{path} has {shape} pixels, not {SIZE}×{SIZE}')
                pixels = np.asarray(image.convert('RGB'))
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f'{path} cannot be read as an image: {error}') from error
        images[row] = pixels.transpose(2, 0, 1).ravel()
    return images


def _write(
    published: Published,
    folder: Path,
    files: Mapping[str, Sequence[Path]],
    images: Mapping[str, np.ndarray],
) -> None:
    """Write all into another folder, which gets its name at the end."""
    label_of = {name: label for label, name in enumerate(published.classes)}
    with scratch_folder(folder.with_name(f'.{folder.name}.writing')) as scratch:
        for split, names in published.files.items():
            for part, name in enumerate(names):
                rows = slice(*(len(files[split]) * i // len(names) for i in (part, part + 1)))
                of_part = files[split][rows]
                content = {
                    'batch_label': f'{split} batch {part + 1} of {len(names)}',
                    published.labels: [label_of[path.parent.name] for path in of_part],
                    'data': images[split][rows],
                    'filenames': [path.name for path in of_part],
                }
                (scratch / name).write_bytes(pickle.dumps(content))
        file, key = published.meta
        (scratch / file).write_bytes(pickle.dumps({key: list(published.classes)}))
        noted = {path.name: md5_of(path, progress=False) for path in sorted(scratch.iterdir())}
        (scratch / NOTE).write_text(json.dumps(noted, indent=2))
        scratch.rename(folder)
