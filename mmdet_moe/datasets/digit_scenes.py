"""Generator of *digit scenes*: a detection data set in COCO's layout that needs no download.

Every image shows a few handwritten digits (or Fashion-MNIST items) in random colours on a crop of a
real photograph. The photographs are files of scikit-image's wheel, the digits of scikit-learn's.
Training and validation share neither sprites nor photographs (see :data:`BACKGROUNDS`).

The sizes are drawn so that COCO's three size bins (small below 32² px of area, medium up to 96²,
large above) each get a fair share. A box is tight around the visible ink, whether or not another
object covers a part of it, and ``area`` of an annotation is the area of its box, ``w * h``, which
is what COCO's evaluation bins by.

Image ``i`` of a split depends on the seed, the split and ``i`` alone: a data set of 100 images is
the beginning of one of 1,000 with the same seed.

The class names are the sprites' own, so a config sets ``metainfo=dict(classes=...)`` and the number
of classes to those listed under ``classes`` in ``dataset.json``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmdet_moe.datasets.coco_file import count_objects
from mmdet_moe.datasets.sprites import SpriteSet, digest, load_sprites
from mmdet_moe.errors import ConfigError
from mmdet_moe.files import scratch_folder
from mmdet_moe.progress import progress_bar

# Raise it whenever the same parameters would give other images or annotations.
GENERATOR_VERSION = 1

SPLITS = ('train', 'val')
BACKGROUNDS = {
    'train': (
        'astronaut.png',
        'brick.png',
        'camera.png',
        'coffee.png',
        'grass.png',
        'motorcycle_left.png',
        'rocket.jpg',
    ),
    'val': ('chelsea.png', 'coins.png', 'gravel.png', 'ihc.png', 'moon.png'),
}
"""Photographs in scikit-image's wheel; those of the two splits show different scenes."""

# Square roots of box areas in px. A gap of a pixel around COCO's limits 32 and 96 keeps rounding
# to whole pixels from moving an object into the next bin.
SIZE_BINS = {'small': (10.0, 31.0), 'medium': (33.0, 95.0), 'large': (97.0, 200.0)}
MAX_SIDE = 0.8
"""Longest side of a box, as a fraction of the image's side."""
MAX_COVERAGE = 0.2
"""Largest intersection of two boxes, as a fraction of the smaller box."""

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 4096
MIN_CONTRAST = 80.0
# Light ink on darkened photographs: with ink of either polarity a small detector spends the few
# minutes of the demo on telling digits from photographs, and learns their classes too late.
BACKGROUND_GAIN = (0.35, 0.65)
DARKEST_INK = 150

# Fainter ink than this cannot be seen: it is wiped out, and the box does not count it.
_VISIBLE_ALPHA = 0.2
_POSITIONS_PER_SIZE = 20
_SIZES_PER_BIN = 4
_INK_CANDIDATES = 32
_LUMA_OF_BGR = np.array([0.114, 0.587, 0.299], np.float32)
_JPEG_QUALITY = 95
_MANIFEST = 'dataset.json'


@dataclass(frozen=True)
class Placement:
    """One object of a scene.

    Attributes:
        alpha: ``(h, w)`` float32 opacity in 0..1, cropped to the visible ink.
        x: left column of the box in px.
        y: top row of the box in px.
        label: class index.
    """

    alpha: np.ndarray
    x: int
    y: int
    label: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The box as COCO writes it: ``(x, y, width, height)`` in px."""
        height, width = self.alpha.shape
        return self.x, self.y, width, height


def generate(
    out: str | Path,
    num_train: int,
    num_val: int,
    size: int,
    seed: int,
    sprites: str = 'digits',
    source: str | Path | None = None,
    objects: tuple[int, int] = (3, 8),
    overwrite: bool = False,
) -> dict:
    """Write a data set of digit scenes, or find that it is there already.

    Args:
        out: folder of the data set. It appears whole or not at all.
        num_train: number of images in ``train2017``.
        num_val: number of images in ``val2017``.
        size: side of the square images in px, 64 to 4096.
        seed: seed of everything random, at least 0.
        sprites: 'digits' or 'fashion-mnist'.
        source: folder of Fashion-MNIST's idx files, for 'fashion-mnist' only.
        objects: least and largest number of objects in an image. A crowded image gets fewer when
            no further object fits.
        overwrite: replace a data set of other parameters, or an incomplete one.

    Returns:
        ``{'status': 'generated' or 'already there', 'out': str, 'splits': {'train2017': {'images':
        int, 'objects': int, 'sizes': {'small': int, 'medium': int, 'large': int}, 'classes':
        {name: int}}, 'val2017': {...}}}``.

    Raises:
        ConfigError: a parameter is out of range, a source is missing, or ``out`` holds something
            that may not be replaced.
    """
    _check_parameters(num_train, num_val, size, seed, objects)
    sprite_sets = load_sprites(sprites, source)
    parameters = {
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
        'sprites': sprites,
        'sprites_sha256': digest(sprite_sets),
        'objects': list(objects),
    }
    out = Path(out).resolve()
    if (present := _already_there(out, parameters, overwrite)) is not None:
        return {'status': 'already there', 'out': str(out), 'splits': present}

    # A sibling, so that the final rename stays within one file system.
    with scratch_folder(out.with_name(f'.{out.name}.partial-{os.getpid()}')) as scratch:
        summary = {
            f'{split}2017': _write_split(scratch, split, count, size, seed, sprite_sets, objects)
            for split, count in (('train', num_train), ('val', num_val))
        }
        manifest = {
            'generator': 'digit-scenes',
            'generator_version': GENERATOR_VERSION,
            'parameters': parameters,
            'classes': list(sprite_sets['train'].classes),
            'backgrounds': BACKGROUNDS,
            'splits': summary,
        }
        (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')
        _move_into_place(scratch, out)
    return {'status': 'generated', 'out': str(out), 'splits': summary}


def _check_parameters(
    num_train: int, num_val: int, size: int, seed: int, objects: tuple[int, int]
) -> None:
    for name, value in (('num_train (--images)', num_train), ('num_val (--val-images)', num_val)):
        if value < 1:
            raise ConfigError(f'{name} must be at least 1, not {value}')
    if not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise ConfigError(f'size must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} px, not {size}')
    if seed < 0:
        raise ConfigError(f'seed must be at least 0, not {seed}')
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1]:
        raise ConfigError(
            'objects must be the least and the largest number per image, such as 3 8, '
            f'not {" ".join(map(str, objects))}'
        )


def _already_there(out: Path, parameters: dict, overwrite: bool) -> dict | None:
    """The summary of the complete data set in ``out``, or None when ``out`` may be (re)written.

    Raises:
        ConfigError: ``out`` holds something else, which ``overwrite`` does not cover.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = _read_manifest(out)
    if manifest is None:
        # Not even with overwrite: it may be somebody's only copy of something.
        raise ConfigError(
            f'{out} exists and is no digit-scenes data set: choose another folder or move it away'
        )
    differences = _differences(manifest, parameters)
    incomplete = _find_missing(out, manifest)
    if not differences and not incomplete:
        return manifest['splits']
    if overwrite:
        return None
    problem = (
        f'has other parameters ({"; ".join(differences)})'
        if differences
        else f'is incomplete ({incomplete})'
    )
    raise ConfigError(
        f'the data set in {out} {problem}: choose another folder or move it away; '
        '`tools/prepare_data.py digit-scenes` replaces it with --overwrite'
    )


def _read_manifest(out: Path) -> dict | None:
    try:
        manifest = json.loads((out / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get('generator') == 'digit-scenes'
    return manifest if is_ours else None


def _differences(manifest: dict, parameters: dict) -> list[str]:
    there = {'generator_version': manifest['generator_version'], **manifest['parameters']}
    asked = {'generator_version': GENERATOR_VERSION, **parameters}
    return [
        f'{name} is {there.get(name)}, asked for {value}'
        for name, value in asked.items()
        if there.get(name) != value
    ]


def _find_missing(out: Path, manifest: dict) -> str | None:
    for split, counts in manifest['splits'].items():
        if not (out / 'annotations' / f'instances_{split}.json').is_file():
            return f'annotations/instances_{split}.json is missing'
        found = sum(1 for _ in (out / split).glob('*.jpg'))
        if found != counts['images']:
            return f'{split} holds {found} of {counts["images"]} images'
    return None


def _move_into_place(scratch: Path, out: Path) -> None:
    if not out.exists():
        scratch.rename(out)
        return
    old = out.with_name(f'.{out.name}.old-{os.getpid()}')
    out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _write_split(
    folder: Path,
    split: str,
    count: int,
    size: int,
    seed: int,
    sprite_sets: dict[str, SpriteSet],
    objects: tuple[int, int],
) -> dict:
    """Write one split's images and annotation file; return its counts."""
    sprites = sprite_sets[split]
    photos = load_backgrounds(split)
    (folder / f'{split}2017').mkdir()
    (folder / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for index in progress_bar(range(count), desc=f'{split}2017', unit='image'):
        image, placements = render_scene(seed, split, index, size, sprites, photos, objects)
        image_id = index + 1
        name = f'{image_id:012d}.jpg'
        path = folder / f'{split}2017' / name
        if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]):
            raise OSError(f'{path} could not be written')
        images.append(
            {'id': image_id, 'file_name': name, 'width': size, 'height': size, 'license': 1}
        )
        annotations += [
            _coco_annotation(len(annotations) + offset, image_id, placement)
            for offset, placement in enumerate(placements, start=1)
        ]
    coco = {
        'info': {
            'description': f'mmdet_moe digit scenes, {split}',
            'version': str(GENERATOR_VERSION),
        },
        'licenses': [{'id': 1, 'name': 'generated', 'url': ''}],
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': label, 'name': name, 'supercategory': 'object'}
            for label, name in enumerate(sprites.classes, start=1)
        ],
    }
    (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco))
    return count_objects(coco)


def _coco_annotation(annotation_id: int, image_id: int, placement: Placement) -> dict:
    x, y, width, height = placement.box
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': placement.label + 1,
        'bbox': [x, y, width, height],
        'area': width * height,
        'iscrowd': 0,
        'segmentation': [[x, y, x + width, y, x + width, y + height, x, y + height]],
    }


def load_backgrounds(split: str) -> list[np.ndarray]:
    """Load the photographs of a split as ``(H, W, 3)`` uint8 BGR arrays.

    Raises:
        ConfigError: scikit-image is not installed or does not hold a photograph.
    """
    try:
        import skimage
    except ImportError as error:
        raise ConfigError(
            'the backgrounds come from scikit-image: install it with `pip install scikit-image`'
        ) from error
    # The files are read directly: skimage.data's functions may copy them to a cache or go online.
    folder = Path(skimage.__file__).parent / 'data'
    photos = []
    for name in BACKGROUNDS[split]:
        photo = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)
        if photo is None:
            raise ConfigError(
                f'this scikit-image ({skimage.__version__}) has no data/{name}: '
                'install one from a wheel that holds it, such as 0.22 to 0.26'
            )
        photos.append(photo)
    return photos


def render_scene(
    seed: int,
    split: str,
    index: int,
    size: int,
    sprites: SpriteSet,
    photos: Sequence[np.ndarray],
    objects: tuple[int, int] = (3, 8),
) -> tuple[np.ndarray, list[Placement]]:
    """Render one image, which depends on nothing but the arguments.

    Args:
        seed: seed of the data set.
        split: 'train' or 'val'.
        index: number of the image in its split, from 0.
        size: side of the image in px.
        sprites: the sprites to choose from.
        photos: ``(H, W, 3)`` uint8 BGR photographs to take the background from.
        objects: least and largest number of objects.

    Returns:
        The image, ``(size, size, 3)`` uint8 BGR, and its objects in the order they are drawn in.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image = crop_background(rng, photos[rng.integers(len(photos))], size)
    placements = plan_scene(rng, sprites, size, int(rng.integers(objects[0], objects[1] + 1)))
    for placement in placements:
        draw(image, placement, rng)
    return image, placements


def crop_background(rng: np.random.Generator, photo: np.ndarray, size: int) -> np.ndarray:
    """Cut a random square from a photograph, flip it at random and darken it.

    Args:
        rng: source of randomness.
        photo: ``(H, W, 3)`` uint8.
        size: side of the result in px.

    Returns:
        ``(size, size, 3)`` uint8.
    """
    height, width = photo.shape[:2]
    side = int(min(height, width) * rng.uniform(0.5, 1.0))
    top = rng.integers(height - side + 1)
    left = rng.integers(width - side + 1)
    crop = photo[top : top + side, left : left + side]
    crop = crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=interpolation)
    gain, offset = rng.uniform(*BACKGROUND_GAIN), rng.uniform(-15, 15)
    return np.clip(crop * np.float32(gain) + np.float32(offset), 0, 255).astype(np.uint8)


def plan_scene(
    rng: np.random.Generator, sprites: SpriteSet, size: int, count: int
) -> list[Placement]:
    """Choose sprites, sizes and places for ``count`` objects, large ones first.

    An object that finds no place is made smaller, at last by a size bin, and left out when even
    that fails.
    """
    wanted = []
    for _ in range(count):
        index = int(rng.integers(len(sprites.images)))
        outline = Outline.of(sprites.images[index], sprites.ink)
        bins = outline.size_bins(MAX_SIDE * size)
        low, high = bins[rng.integers(len(bins))]
        wanted.append((_log_uniform(rng, low, high), index, outline, bins))
    wanted.sort(key=lambda item: item[0], reverse=True)

    placements: list[Placement] = []
    for target, index, outline, bins in wanted:
        for candidate in _shrinking_sizes(rng, target, bins):
            alpha = outline.render(candidate)
            corner = _find_place(rng, alpha.shape, size, placements)
            if corner is not None:
                placements.append(Placement(alpha, *corner, label=int(sprites.labels[index])))
                break
    return placements


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _shrinking_sizes(
    rng: np.random.Generator, target: float, bins: Sequence[tuple[float, float]]
) -> Iterator[float]:
    """Sizes to try in turn: ``target``, then smaller ones of its bin, then of the bins below."""
    for low, high in reversed(bins):
        if low > target:
            continue
        target = min(target, high)
        for _ in range(_SIZES_PER_BIN):
            yield target
            target = _log_uniform(rng, low, target)


def _find_place(
    rng: np.random.Generator, shape: tuple[int, int], size: int, placements: Sequence[Placement]
) -> tuple[int, int] | None:
    height, width = shape
    for _ in range(_POSITIONS_PER_SIZE):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (x, y, width, height)
        if all(coverage(box, other.box) <= MAX_COVERAGE for other in placements):
            return x, y
    return None


def coverage(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection of two xywh boxes as a fraction of the smaller one's area (never below IoU)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(a[2] * a[3], b[2] * b[3])


@dataclass(frozen=True)
class Outline:
    """A sprite ready to be rendered at any size.

    Attributes:
        pixels: ``(h, w)`` float32 intensities in 0..1: the sprite's ink in an empty frame, one
            pixel wide, in which the interpolation can fade out.
        extent: width and height of the visible ink in pixels of the sprite.
        ink: see :class:`~mmdet_moe.datasets.sprites.SpriteSet`.
    """

    pixels: np.ndarray
    extent: tuple[float, float]
    ink: tuple[float, float]

    @classmethod
    def of(cls, sprite: np.ndarray, ink: tuple[float, float]) -> Outline:
        """Prepare a ``(H, W)`` uint8 sprite."""
        pixels = np.pad(_crop(sprite.astype(np.float32) / 255, ink[0]), 1)
        # The extent is measured on an enlargement, because interpolation and ink threshold move
        # the outline by a fraction of a pixel, and that fraction grows with the object.
        factor = max(1.0, 64 / max(pixels.shape))
        height, width = _ink_alpha(pixels, factor, ink).shape
        return cls(pixels, (width / factor, height / factor), ink)

    def size_bins(self, max_side: float) -> list[tuple[float, float]]:
        """Ranges of sqrt(area) in px, one per size bin that a box not longer than this can have."""
        limit = max_side * math.sqrt(min(self.extent) / max(self.extent))
        bins = [(low, min(high, limit)) for low, high in SIZE_BINS.values() if low < limit]
        # A very narrow sprite in a very small image fits no bin: it takes the largest size it can.
        return bins or [(limit, limit)]

    def render(self, target: float) -> np.ndarray:
        """Opacity ``(h, w)`` of the ink, tightly cropped, of about ``target`` px = sqrt(h * w)."""
        return _ink_alpha(self.pixels, target / math.sqrt(math.prod(self.extent)), self.ink)


def _ink_alpha(pixels: np.ndarray, factor: float, ink: tuple[float, float]) -> np.ndarray:
    height, width = (max(1, round(length * factor)) for length in pixels.shape)
    interpolation = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    smooth = cv2.resize(pixels, (width, height), interpolation=interpolation)
    alpha = np.clip((smooth - ink[0]) / (ink[1] - ink[0]), 0, 1)
    # The other bound is for scattered specks, which shrinking can make faint all over.
    alpha[alpha < min(_VISIBLE_ALPHA, alpha.max())] = 0
    return _crop(alpha, 0)


def _crop(image: np.ndarray, threshold: float) -> np.ndarray:
    rows = np.flatnonzero((image > threshold).any(axis=1))
    columns = np.flatnonzero((image > threshold).any(axis=0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw(image: np.ndarray, placement: Placement, rng: np.random.Generator) -> None:
    """Blend an object into an ``(H, W, 3)`` uint8 image, in a light colour that stands out."""
    x, y, width, height = placement.box
    patch = image[y : y + height, x : x + width]
    alpha = placement.alpha[..., None]
    colour = _choose_ink(rng, patch, alpha)
    patch[:] = np.round(patch * (1 - alpha) + colour * alpha).astype(np.uint8)


def _choose_ink(rng: np.random.Generator, patch: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The first random light colour that contrasts enough with the patch, else the best one."""
    candidates = rng.integers(DARKEST_INK, 256, (_INK_CANDIDATES, 3)).astype(np.float32)
    background = patch.reshape(-1, 3).mean(axis=0) @ _LUMA_OF_BGR
    contrast = np.abs(candidates @ _LUMA_OF_BGR - background)
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    return candidates[enough[0] if len(enough) else contrast.argmax()]
