"""The choice of images and crops that a report carries with it.

A whole image costs more than ten times as much as a crop, so images are chosen, and every image
brings crops of (nearly) all of its rows. What chooses the images are *cells*, sets of rows of which
somebody will want to see some:

1. an expert of a layer, a random sample of the images, one random object (detection) of each,
2. the same expert, its highest weights first,
3. the same by object size, and by what became of the object (detection),
4. a class by the same.

First a few images are found that show every expert's highest weight; then the cells take turns.
A wall has one tile for each image, so that a cell wants rows of different images. One decision per
image and level gives many rows the same weight: equal ones come in the order of the random sample,
:func:`random_keys`. A correct detection has no crop of its own: it is shown in its object's.
"""

import base64
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np

from mmdet_moe.analysis.data import hashed
from mmdet_moe.analysis.report.explorer.packing import NO_WEIGHT
from mmdet_moe.analysis.statistics.matching import CORRECT, KINDS
from mmdet_moe.analysis.statistics.outcomes import Outcomes
from mmdet_moe.errors import ConfigError

#: Upper limits of small and medium objects, in px (COCO's).
SIZE_LIMITS = (32, 96)
CROP_SIDE = 96
#: Longest side of a whole image, and of one where very many experts have to share the budget.
IMAGE_SIDE, IMAGE_SIDE_CROWDED, CROWDED = 480, 320, 64
IMAGE_QUALITY, CROP_QUALITY = 70, 80
#: Places of rows in the random order of an image.
ROWS = 4096
#: Rows of each expert's random sample.
SAMPLE = 24
#: Crops that an image brings by itself. Further ones are cut where a cell asks for them.
CROPS_PER_IMAGE = 8
#: How much of its surroundings a crop shows, as a multiple of the box's longer side.
CONTEXT, MIN_CONTEXT_SIDE = 1.3, 24
#: Weights that differ by no more than these steps (of 254) are as good as each other.
TOLERANCE = 5
#: Images that may be found too large for what is left, before the pool counts as full.
MISFITS = 4
#: JSON's punctuation and the packed columns of one crop, and the fields of one image, in bytes.
CROP_OVERHEAD, IMAGE_OVERHEAD = 24, 64


@dataclass
class StoredImage:
    """A whole image, and crops that can be taken from it."""

    width: int
    height: int
    jpeg: str
    crops: dict[int, str]
    regions: dict[int, tuple[int, int, int, int]]


@dataclass
class Pool:
    """What was chosen.

    Attributes:
        images: By index; width and height are the original ones, in px.
        crops: Base64 JPEG by row of the outcomes, in the order of choice.
        unreadable: Images that were wanted and could not be read, with the reasons.
    """

    images: dict[int, StoredImage] = field(default_factory=dict)
    crops: dict[int, str] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)

    def regions(self) -> np.ndarray:
        """int32 (m, 4), what the crops show: ``(x1, y1, x2, y2)`` in px of the original image."""
        owner = {row: image for image in self.images.values() for row in image.crops}
        regions = [owner[row].regions[row] for row in self.crops]
        return np.array(regions, np.int32).reshape(-1, 4)


def random_keys(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """A random order of the images, and of the rows within each.

    It depends on nothing but an image's number and a row's place in its image. ``explorer.js`` has
    the same function, so that the page's random sample is one of all images and not of those with
    pictures: for the seed 0 its beginning has pictures. All experts share it, and so the pictures.

    Args:
        image: int (n,), ascending.
        seed: Of the order.

    Returns:
        int64 (n,); ascending keys are the order.
    """
    place = (np.arange(len(image)) - np.searchsorted(image, image)).astype(np.uint32)
    of_image = hashed(image.astype(np.uint32) ^ hashed(np.array([seed], np.uint32)))
    of_row = hashed(of_image ^ place) % np.uint32(ROWS)
    return of_image.astype(np.int64) * ROWS + of_row


@dataclass
class _Cell:
    """Rows of which some are to be shown.

    Attributes:
        candidates: int (c,), the best rows, best first.
        rank: float (c,), how good they are.
        counts: Which of some rows, (m,) to bool (m,), satisfy the cell as well as a candidate.
    """

    candidates: np.ndarray
    rank: np.ndarray
    counts: Callable[[np.ndarray], np.ndarray]


class _Full(Exception):
    """The budget is used up."""


def fill_pool(
    outcomes: Outcomes,
    weights: dict[str, np.ndarray],
    load_image: Callable[[int], np.ndarray],
    budget: int,
) -> Pool:
    """Choose and encode images and crops; the same input gives the same choice.

    Args:
        outcomes: n rows.
        weights: (n, E) by layer, from :func:`.packing.in_steps`.
        load_image: The RGB image, uint8 (H, W, 3), of an index.
        budget: Bytes of JSON that all of it may take.
    """
    filler = _Filler(outcomes, weights, load_image, budget)
    with contextlib.suppress(_Full):
        filler.fill()
    return filler.pool


class _Filler:
    def __init__(
        self,
        outcomes: Outcomes,
        weights: dict[str, np.ndarray],
        load_image: Callable[[int], np.ndarray],
        budget: int,
    ) -> None:
        self.outcomes = outcomes
        self.load_image = load_image
        self.budget = budget
        self.used = 0
        self.pool = Pool()
        self.misfits: set[int] = set()
        self.score = np.nan_to_num(outcomes.score)
        self.label = outcomes.counted_label.astype(np.int64)
        self.key = random_keys(outcomes.image)
        # Where a row is shown.
        shared = outcomes.is_detection & (outcomes.kind == CORRECT)
        self.pictured = np.arange(len(outcomes)) + np.where(shared, outcomes.partner, 0)
        self.own = self.pictured == np.arange(len(outcomes))
        size_bin = np.digitize(np.nan_to_num(outcomes.size), SIZE_LIMITS)
        # A classifier's images are all "small".
        kind = outcomes.is_detection * len(KINDS) + outcomes.kind
        self.group = size_bin.astype(np.int64) * 2 * len(KINDS) + kind
        self.num_groups = 6 * len(KINDS)
        self.highest = np.zeros(len(outcomes), np.float32)
        for values in weights.values():
            seen = np.where(values == NO_WEIGHT, 0, values)
            np.maximum(self.highest, seen.max(axis=1), out=self.highest)
        order = np.argsort(outcomes.image, kind='stable')
        images, starts = np.unique(outcomes.image[order], return_index=True)
        parts = np.split(order, starts[1:]) if len(images) else []
        self.rows_of = {
            image: part[self.own[part]] for image, part in zip(images.tolist(), parts, strict=True)
        }
        self.samples, self.experts, self.expert_groups = self._expert_cells(weights)
        self.class_groups = self._class_cells()
        crowded = sum(values.shape[1] for values in weights.values()) > CROWDED
        self.image_side = IMAGE_SIDE_CROWDED if crowded else IMAGE_SIDE

    # Cells ---------------------------------------------------------------------------------------

    def _ranking(self, rows: np.ndarray, rank: np.ndarray, limit: int) -> np.ndarray:
        """Positions in ``rows``, one of each image: highest rank, then in random order."""
        order = np.lexsort((self.key[rows], -rank.astype(float)))
        _, first = np.unique(self.outcomes.image[rows[order]], return_index=True)
        return order[np.sort(first)[:limit]]

    def _cell(
        self,
        rows: np.ndarray,
        rank: np.ndarray,
        limit: int,
        counts: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> _Cell:
        chosen = self._ranking(rows, rank, limit)
        candidates = self.pictured[rows[chosen]]
        if counts is None:
            counts = partial(np.isin, test_elements=candidates)
        return _Cell(candidates, rank[chosen].astype(float), counts)

    def _expert_cells(
        self, weights: dict[str, np.ndarray]
    ) -> tuple[list[_Cell], list[_Cell], list[_Cell]]:
        samples, experts, groups = [], [], []
        for column in (column for values in weights.values() for column in values.T):
            took_part = (column > 0) & (column != NO_WEIGHT)
            for population in (False, True):
                rows = np.flatnonzero(took_part & (self.outcomes.is_detection == population))
                if not len(rows):
                    continue
                chosen = self._ranking(rows, np.zeros(len(rows)), SAMPLE)
                # One after the other: none is as good as the one before.
                rank = -(TOLERANCE + 1.0) * np.arange(len(chosen))
                candidates = self.pictured[rows[chosen]]
                samples.append(_Cell(candidates, rank, partial(np.isin, test_elements=candidates)))
                experts.append(self._cell(rows, column[rows], 48))
            rows = np.flatnonzero(took_part & self.own)
            for group in np.unique(self.group[rows]).tolist():
                part = rows[self.group[rows] == group]
                counts = partial(self._in_group, column=column, group=group)
                groups.append(self._cell(part, column[part], 12, counts))
        return samples, experts, groups

    def _in_group(self, rows: np.ndarray, column: np.ndarray, group: int) -> np.ndarray:
        active = (column[rows] > 0) & (column[rows] != NO_WEIGHT)
        return active & (self.group[rows] == group)

    def _class_cells(self) -> list[_Cell]:
        key = self.label * self.num_groups + self.group
        cells = []
        for value in np.unique(key[self.own]):
            rows = np.flatnonzero(self.own & (key == value))
            counts = partial(lambda rows, value: key[rows] == value, value=value)
            cells.append(self._cell(rows, np.zeros(len(rows), np.uint8), 8, counts))
        return cells

    # Choice --------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Add until everything that is wanted is there.

        Raises:
            _Full: If the budget ends before.
        """
        for row in self._cover():
            self._want(row)
        # Shares of the budget up to which a stage may go, so that later ones get some as well.
        for cells, target, share in (
            (self.samples, SAMPLE, 0.35),
            (self.experts, 8, 0.6),
            (self.expert_groups, 2, 0.75),
            (self.class_groups, 1, 0.9),
            (self.experts, 48, 0.95),
            (self.expert_groups, 12, 1.0),
            (self.class_groups, 8, 1.0),
        ):
            self._take_turns(cells, target, share * self.budget)

    def _cover(self) -> Iterable[int]:
        """Rows of few images among which every expert has one of its highest weight."""
        wants: dict[int, dict[int, int]] = defaultdict(dict)
        for i, cell in enumerate(self.experts):
            for row in cell.candidates[cell.rank == cell.rank[0]].tolist():
                wants[int(self.outcomes.image[row])].setdefault(i, row)
        while wants:
            best = min(wants, key=lambda image: (-len(wants[image]), image))
            covered = wants.pop(best)
            yield from covered.values()
            for image in list(wants):
                wants[image] = {i: row for i, row in wants[image].items() if i not in covered}
                if not wants[image]:
                    del wants[image]

    def _take_turns(self, cells: Sequence[_Cell], target: int, limit: float) -> None:
        stored = self._stored()
        for count in range(1, target + 1):
            for cell in cells:
                if self.used >= limit:
                    return
                if np.count_nonzero(cell.counts(stored)) >= count:
                    continue
                row = self._next(cell)
                if row is not None and self._want(row):
                    stored = self._stored()

    def _stored(self) -> np.ndarray:
        return np.fromiter(self.pool.crops, int, len(self.pool.crops))

    def _next(self, cell: _Cell) -> int | None:
        """The best candidate that is not there yet."""
        shown, left = set(), []
        for row, rank in zip(cell.candidates.tolist(), cell.rank.tolist(), strict=True):
            image = int(self.outcomes.image[row])
            if row in self.pool.crops:
                shown.add(image)
            elif image not in self.misfits:
                left.append((row, image, rank))
        equal = [(row, image) for row, image, rank in left if rank >= left[0][2] - TOLERANCE]
        if not equal:
            return None
        # Rather an image that shows this cell something new; of these, one that is there already.
        return min(equal, key=lambda e: (e[1] in shown, e[1] not in self.pool.images))[0]

    def _want(self, row: int) -> bool:
        """Add the crop of a row, with its image; whether it fitted."""
        image = int(self.outcomes.image[row])
        if image in self.misfits:
            return False
        stored = self.pool.images.get(image)
        if stored is None:
            try:
                stored = self._encode(image)
            except (ConfigError, OSError) as error:
                self.misfits.add(image)
                self.pool.unreadable[image] = str(error)
                return False
            own = self._most_varied(self.rows_of[image], row)
            price = len(stored.jpeg) + IMAGE_OVERHEAD
            price += sum(len(stored.crops[r]) + CROP_OVERHEAD for r in own)
        else:
            own = [row]
            price = len(stored.crops[row]) + CROP_OVERHEAD
        if self.used + price > self.budget:
            self.misfits.add(image)
            if len(self.misfits) - len(self.pool.unreadable) > MISFITS:
                raise _Full
            return False
        self.used += price
        self.pool.images[image] = stored
        self.pool.crops |= {r: stored.crops[r] for r in own if r not in self.pool.crops}
        return True

    def _most_varied(self, rows: np.ndarray, wanted: int) -> list[int]:
        """At most :data:`CROPS_PER_IMAGE` rows of an image, of many classes, sizes and kinds."""
        key = self.label[rows] * self.num_groups + self.group[rows]
        order = np.lexsort((rows, -self.score[rows], -self.highest[rows], key))
        ranked = rows[order][np.argsort(_repeats(key[order]), kind='stable')].tolist()
        ranked.remove(wanted)
        return [wanted, *ranked[: CROPS_PER_IMAGE - 1]]

    # Encoding ------------------------------------------------------------------------------------

    def _shown_box(self, row: int) -> np.ndarray:
        """(4,), the box of an object with that of the detection that found it."""
        box, partner = self.outcomes.box[row], row + self.outcomes.partner[row]
        if self.outcomes.kind[row] != CORRECT:
            return box
        other = self.outcomes.box[partner]
        return np.concatenate([np.minimum(box[:2], other[:2]), np.maximum(box[2:], other[2:])])

    def _encode(self, index: int) -> StoredImage:
        pixels = np.ascontiguousarray(self.load_image(index)[..., ::-1])
        height, width = pixels.shape[:2]
        rows = self.rows_of[index].tolist()
        has_box = ~np.isnan(self.outcomes.size)
        regions = {
            row: _surroundings(self._shown_box(row), width, height)
            if has_box[row]
            else (0, 0, width, height)
            for row in rows
        }
        crops = {
            row: _jpeg(pixels[y1:y2, x1:x2], CROP_SIDE, CROP_QUALITY)
            for row, (x1, y1, x2, y2) in regions.items()
        }
        return StoredImage(
            width, height, _jpeg(pixels, self.image_side, IMAGE_QUALITY), crops, regions
        )


def _repeats(*keys: np.ndarray) -> np.ndarray:
    """How many neighbours before each row have the same keys."""
    places = np.arange(len(keys[0]))
    changes = np.any([np.diff(key, prepend=key[:1]) != 0 for key in keys], axis=0)
    return places - np.maximum.accumulate(np.where(changes, places, 0))


def _surroundings(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """A square around a box, moved and, if need be, cut to lie inside the image."""
    x1, y1, x2, y2 = (float(value) for value in box)
    side = max(round(max(x2 - x1, y2 - y1) * CONTEXT), MIN_CONTEXT_SIDE)

    def span(centre: float, limit: int) -> tuple[int, int]:
        length = min(side, limit)
        start = min(max(round(centre - length / 2), 0), limit - length)
        return start, start + length

    (left, right), (top, bottom) = span((x1 + x2) / 2, width), span((y1 + y2) / 2, height)
    return left, top, right, bottom


def _jpeg(pixels: np.ndarray, longest: int, quality: int) -> str:
    """Base64 JPEG of a BGR image, made smaller where a side is longer than ``longest``."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale < 1:
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    return base64.b64encode(cv2.imencode('.jpg', pixels, options)[1].tobytes()).decode()
