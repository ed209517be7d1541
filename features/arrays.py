"""Pixels of any numeric type as plain RGB."""

import numpy as np
from PIL import Image

from features.images import ImageError, to_rgb


def from_array(array, mode=None):
    """Return pixels of any numeric type as an RGB image.

    Args:
        array: array-like, [H, W] or [H, W, 1..4]; integers use their full range (16 bit: 0..65535; 32-bit integers
            that stay below 65536 count as 16 bit, below 256 as 8 bit), floats 0..1 or else their own minimum..maximum.
        mode: PIL's mode of the bands; None: L, LA, RGB or RGBA, by their number.
    Returns: PIL image of mode RGB.
    Raises: ImageError for other shapes.
    """
    array = np.asarray(array)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.shape[-1] > 4:
        raise ImageError(f"shape {array.shape} is no image")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = _to_bytes(array.astype(np.float64), np.issubdtype(array.dtype, np.floating), array.dtype.itemsize)
    bands = [Image.fromarray(np.ascontiguousarray(array[..., band])) for band in range(array.shape[-1])]
    return to_rgb(Image.merge(mode or ("L", "LA", "RGB", "RGBA")[len(bands) - 1], bands))


def _to_bytes(values, floating, itemsize):
    """Scale numbers to 0..255."""
    values = np.nan_to_num(values)
    low, high = values.min(), values.max()
    if floating:
        low, high = (0, 1) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high < 2**16:
        low, high = 0, 255 if itemsize > 2 and high < 2**8 else 2**16 - 1
    return np.uint8(np.round((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255))
