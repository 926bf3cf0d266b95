"""Arrays as short JSON: deflated, then base64; ``explorer.js`` reads the same form."""

import base64
import zlib

import numpy as np

#: Weights travel in steps of 1 / 254; 255 stands for NaN.
WEIGHT_STEPS, NO_WEIGHT = 254, 255
#: Those of a layer with more experts than this are small; they travel in so many steps for each.
FEW_EXPERTS, FINE = 32, 257
#: A smaller weight would be 0 without them.
_LEAST = 0.5 / WEIGHT_STEPS


def pack(array: np.ndarray) -> dict:
    """``{'dtype', 'shape', 'data'}`` of an array, little-endian."""
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder('<'), copy=False)
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return {'dtype': array.dtype.name, 'shape': list(array.shape), 'data': data}


def unpack(packed: dict) -> np.ndarray:
    """The inverse of :func:`pack`.

    Raises:
        ValueError, KeyError, TypeError, zlib.error: It is damaged.
    """
    data = zlib.decompress(base64.b64decode(packed['data'], validate=True))
    dtype = np.dtype(packed['dtype']).newbyteorder('<')
    return np.frombuffer(data, dtype).reshape(packed['shape'])


def quantise(values: np.ndarray) -> np.ndarray:
    """Floats of 0..1 as uint8 in steps of 1 / :data:`WEIGHT_STEPS`; NaN as :data:`NO_WEIGHT`."""
    steps = np.rint(np.clip(np.nan_to_num(values), 0, 1) * WEIGHT_STEPS)
    return np.where(np.isnan(values), NO_WEIGHT, steps).astype(np.uint8)


def quantise_weights(values: np.ndarray) -> np.ndarray:
    """Weights (n, E): uint8 as :func:`quantise`; uint16 in finer steps where some are small.

    What is 0 took no part, so that a weight above 0 stays above it.
    """
    if values.shape[1] <= FEW_EXPERTS and not ((values > 0) & (values <= _LEAST)).any():
        return quantise(values)
    steps = np.where(np.isnan(values), NO_WEIGHT, np.clip(values, 0, 1) * WEIGHT_STEPS)
    fine = np.rint(steps * FINE).astype(np.uint16)  # NO_WEIGHT becomes the largest number
    return np.where((values > 0) & (fine == 0), np.uint16(1), fine)


def in_steps(weights: np.ndarray) -> np.ndarray:
    """What :func:`quantise_weights` gave in steps of 1 / :data:`WEIGHT_STEPS`, with fractions."""
    return weights if weights.dtype == np.uint8 else weights.astype(np.float32) / FINE
