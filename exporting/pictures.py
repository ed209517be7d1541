"""An encoder's preprocessing, as settings that runtime/ reads."""

import numpy as np
from PIL import Image

from models.exported import runtime

SIZES = ((45, 70), (300, 200), (33, 40))  # of random pictures, [H, W]
# mean difference of pixels, of 255 levels; it is 0.008 for transformers' processors, whose bicubic (torchvision's) is a
# level off Pillow's in one pixel of 150
TOLERANCE = 0.05


def preprocessing(encoder):
    """Return the arguments of the runtime's Preprocess; raises ValueError where its pixels would differ.

    Args:
        encoder: encoders.base.ImageEncoder.
    """
    preprocessing = {"size": None, "interpolation": None, "crop": None} | encoder.preprocessing()
    preprocessing["size"] = _plain_size(preprocessing["size"])
    try:
        own = runtime().images.Preprocess(**preprocessing)
        same = all(_difference(encoder.preprocess, own, size) < TOLERANCE for size in SIZES)
    except (TypeError, ValueError):
        same = False
    if not same:
        steps = " ".join(str(getattr(encoder.preprocess, "transforms", preprocessing)).split())
        raise ValueError(f"the preprocessing of {encoder.name} cannot be exported: {steps}")
    return preprocessing


def _plain_size(size):
    """Return a side in pixels, [rows, columns] or None, whatever form a library gives it."""
    if isinstance(size, dict):
        size = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
    if isinstance(size, list | tuple):
        return size[0] if len(size) == 1 else list(size)
    return size


def _difference(theirs, ours, size):
    """Return the mean difference of two preprocessings' pixels of a random picture, of 255 levels."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    found, expected = ours(picture), theirs(picture).numpy()
    return np.abs((found - expected) * ours.std).mean() * 255 if found.shape == expected.shape else np.inf
