"""Arrays as short JSON: deflated, then base64; ``explorer.js`` reads the same form."""

import base64
import zlib

import numpy as np

#: Weights travel in steps of 1 / 254; 255 stands for NaN.
WEIGHT_STEPS, NO_WEIGHT = 254, 255


def pack(array: np.ndarray) -> dict:
    """``{'dtype', 'shape', 'data'}`` of an array, little-endian."""
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder('<'), copy=False)
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return {'dtype': array.dtype.name, 'shape': list(array.shape), 'data': data}


def quantise(values: np.ndarray) -> np.ndarray:
    """Floats of 0..1 as uint8 in steps of 1 / :data:`WEIGHT_STEPS`; NaN as :data:`NO_WEIGHT`."""
    steps = np.rint(np.clip(np.nan_to_num(values), 0, 1) * WEIGHT_STEPS)
    return np.where(np.isnan(values), NO_WEIGHT, steps).astype(np.uint8)
