"""What a model did with every object: one row per detection, and one per object that it missed."""

from dataclasses import dataclass

import numpy as np

#: Values of :attr:`Outcomes.kind`.
CORRECT, WRONG, MISSED = 0, 1, 2
KIND_NAMES = ('correct', 'wrong', 'missed')


@dataclass
class Outcomes:
    """Columns of n rows. A classifier's rows are its images, without level and size.

    Attributes:
        image: int32 (n,), index of the image in the data set.
        box: float32 (n, 4), ``(x1, y1, x2, y2)`` in px of the original image.
        label: int32 (n,), the predicted class; of a missed object the true one.
        true_label: int32 (n,), the class of the object behind the row, -1 where there is none.
        score: float32 (n,), in 0..1; NaN for a missed object.
        kind: uint8 (n,), :data:`CORRECT` (matches an object of its class at an IoU of 0.5, each
            object once), :data:`WRONG` (does not) or :data:`MISSED` (an object that nothing
            matches).
        size: float32 (n,), square root of the box's area in px; NaN for a classifier's image.
        level: int32 (n,), pyramid level; -1 where unknown.
        weights: float32 (n, E) by MoE layer, of the decision behind the row (of a missed object:
            the mean over the anchors assigned to it). NaN where the layer took no part.
    """

    image: np.ndarray
    box: np.ndarray
    label: np.ndarray
    true_label: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    level: np.ndarray
    weights: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.image)
