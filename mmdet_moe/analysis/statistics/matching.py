"""Which detection found which object, in the way of COCO's evaluation, and what went wrong, in the
way of TIDE (Bolya et al., arXiv 2008.08115).
"""

from typing import NamedTuple

import numpy as np

#: No object; or a crowd, for which a detection counts neither as correct nor as wrong.
UNMATCHED, IGNORED = -1, -2
#: What became of a detection or an object, and the names of these numbers. CORRECT and the types of
#: errors of TIDE's section 2.2; a detection is never MISSED, an object never one of BOTH, DUPLICATE
#: and BACKGROUND.
KINDS = (
    'correct', 'classification', 'localisation', 'both', 'duplicate', 'background', 'missed',
)  # fmt: skip
CORRECT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
#: TIDE's: at the first intersection over union a box is in the right place, at the second it has
#: nothing to do with the object.
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1


def match(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
    threshold: float = FOREGROUND_IOU,
) -> np.ndarray:
    """Match the detections of one image with its objects.

    In the order of their scores, each detection takes the object of its class that overlaps it most
    among those not taken yet. What is left over and lies on a crowd of its class is ignored.
    Dropping the detections below any score therefore changes nothing for those above.

    Args:
        boxes: float (n, 4), xyxy.
        scores: float (n,).
        labels: int (n,).
        true_boxes: float (m, 4), xyxy.
        true_labels: int (m,).
        crowd: bool (m,).
        threshold: Least intersection over union; on a crowd, least covered share of the detection.

    Returns:
        int64 (n,): index of the object, :data:`UNMATCHED` or :data:`IGNORED`.
    """
    found = np.full(len(boxes), UNMATCHED, np.int64)
    if len(boxes) == 0 or len(true_boxes) == 0:
        return found
    overlaps = _overlaps(boxes, true_boxes, crowd)
    overlaps[labels[:, None] != true_labels[None]] = 0
    free = ~crowd
    for i in np.argsort(-scores, kind='stable'):
        candidates = np.where(free, overlaps[i], 0)
        # Of equally good ones the last, as COCO's evaluation does.
        best = len(candidates) - 1 - int(candidates[::-1].argmax())
        if candidates[best] >= threshold:
            found[i], free[best] = best, False
        elif (overlaps[i][crowd] >= threshold).any():
            found[i] = IGNORED
    return found


class Reasons(NamedTuple):
    """What became of n detections and m objects of one image; partners are indices, -1 for none."""

    kind: np.ndarray  #: int64 (n,), of :data:`KINDS`
    #: int64 (n,), the object that is meant: matched, of the error, or already taken
    partner: np.ndarray
    overlap: np.ndarray  #: float64 (n,), intersection over union with it; NaN without one
    object_kind: np.ndarray  #: int64 (m,)
    #: int64 (m,), the detection that matched it, or would with the right class or place
    object_partner: np.ndarray


def reasons(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    matched: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
) -> Reasons:
    """Say what is wrong with each detection that matches nothing, and why an object is not found.

    The first that holds, with the largest intersection over union with an object of the detection's
    class (*same*) and of other classes (*other*): LOCALISATION for 0.1 <= same <= 0.5,
    CLASSIFICATION for other >= 0.5, DUPLICATE for same >= 0.5 (a better one has taken the object),
    BACKGROUND if both are at most 0.1, else BOTH. An object that nothing matches has the error of
    the detection with the highest score that meant it and only had the wrong class or place; it is
    MISSED if there is none. Crowds take no part.

    Args:
        boxes: float (n, 4), xyxy.
        scores: float (n,).
        labels: int (n,).
        matched: int (n,), from :func:`match`.
        true_boxes: float (m, 4), xyxy.
        true_labels: int (m,).
        crowd: bool (m,).
    """
    object_kind = np.full(len(true_labels), MISSED)
    object_partner = np.full(len(true_labels), UNMATCHED)
    objects = np.flatnonzero(~crowd)
    if len(boxes) == 0 or len(objects) == 0:
        count = len(boxes)
        nothing = np.full(count, BACKGROUND), np.full(count, -1), np.full(count, np.nan)
        return Reasons(*nothing, object_kind, object_partner)
    overlaps = _overlaps(boxes, true_boxes[objects], crowd[objects])
    is_same = labels[:, None] == true_labels[objects]
    same, other = np.where(is_same, overlaps, 0), np.where(is_same, 0, overlaps)
    best_same, best_other = same.max(1), other.max(1)
    correct = matched >= 0
    kind = np.select(
        [
            correct,
            (best_same >= BACKGROUND_IOU) & (best_same <= FOREGROUND_IOU),
            best_other >= FOREGROUND_IOU,
            best_same >= FOREGROUND_IOU,
            np.maximum(best_same, best_other) <= BACKGROUND_IOU,
        ],
        [CORRECT, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND],
        BOTH,
    )
    of_other = np.isin(kind, (CLASSIFICATION, BOTH))
    partner = objects[np.where(of_other, other.argmax(1), same.argmax(1))]
    partner = np.where(correct, matched, np.where(kind == BACKGROUND, -1, partner))
    overlap = np.full(len(boxes), np.nan)
    meant = partner >= 0
    overlap[meant] = overlaps[meant, np.searchsorted(objects, partner[meant])]
    # The one with the highest score is written last, and a match after all errors.
    for wanted in ((LOCALISATION, CLASSIFICATION), (CORRECT,)):
        told = np.flatnonzero(np.isin(kind, wanted))
        told = told[np.argsort(scores[told], kind='stable')]
        object_kind[partner[told]], object_partner[partner[told]] = kind[told], told
    return Reasons(kind, partner, overlap, object_kind, object_partner)


def _overlaps(boxes: np.ndarray, true_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(n, m): intersection over union, or over the detection's own area for a crowd."""
    a, b = boxes[:, None].astype(np.float64), true_boxes[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = sides.clip(min=0).prod(-1)
    own = (a[..., 2:] - a[..., :2]).prod(-1)
    other = (b[..., 2:] - b[..., :2]).prod(-1)
    union = np.where(crowd[None], own, own + other - intersection)
    return intersection / union.clip(min=1e-12)
