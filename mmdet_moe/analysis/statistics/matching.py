"""Which detection found which object, in the way of COCO's evaluation."""

import numpy as np

#: No object; or a crowd, for which a detection counts neither as correct nor as wrong.
UNMATCHED, IGNORED = -1, -2


def match(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
    threshold: float = 0.5,
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


def _overlaps(boxes: np.ndarray, true_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(n, m): intersection over union, or over the detection's own area for a crowd."""
    a, b = boxes[:, None].astype(np.float64), true_boxes[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = sides.clip(min=0).prod(-1)
    own = (a[..., 2:] - a[..., :2]).prod(-1)
    other = (b[..., 2:] - b[..., :2]).prod(-1)
    union = np.where(crowd[None], own, own + other - intersection)
    return intersection / union.clip(min=1e-12)
