"""What turns a picture into an encoder's pixels, in words that runtime/ reads."""

import numpy as np
import torch
from PIL import Image

from models.exported import runtime

STEPS = ("Resize", "CenterCrop", "ToTensor", "Normalize")  # of torchvision's preprocessing, in this order
SIZES = ((45, 70), (300, 200), (33, 40))  # of made pictures, [H, W]
# mean difference of pixels, of 255 levels: transformers' processors round one in 150 pixels of torchvision's bicubic to
# the level beside Pillow's, which is 0.008
TOLERANCE = 0.05


def preprocessing(encoder):
    """Return the arguments of the runtime's Preprocess; raises ValueError where it would make other pixels.

    Args:
        encoder: encoders.base.ImageEncoder.
    """
    told = _of_processor(encoder) if hasattr(encoder.preprocess, "processor") else _of_steps(encoder.preprocess)
    try:
        own = runtime().images.Preprocess(**told)
        same = all(_difference(encoder.preprocess, own, size) < TOLERANCE for size in SIZES)
    except (TypeError, ValueError):
        same = False
    if not same:
        steps = " ".join(str(getattr(encoder.preprocess, "transforms", told)).split())
        raise ValueError(f"the preprocessing of {encoder.name} cannot be exported: {steps}")
    return told


def _of_steps(preprocess):
    """Return what steps of torchvision say, or nothing where there are others."""
    steps = getattr(preprocess, "transforms", ())
    kinds = [type(step).__name__ for step in steps]
    if [kind for kind in STEPS if kind in kinds] != kinds or not {"ToTensor", "Normalize"} <= set(kinds):
        return {}
    told = {"size": None, "interpolation": None, "crop": None}
    for kind, step in zip(kinds, steps, strict=True):
        if kind == "Resize":
            size = step.size if isinstance(step.size, int) else list(step.size)
            told |= {"size": size[0] if isinstance(size, list) and len(size) == 1 else size,
                     "interpolation": step.interpolation.value}  # fmt: skip
        elif kind == "CenterCrop":
            told["crop"] = list(step.size)
        elif kind == "Normalize":
            told |= {name: torch.as_tensor(getattr(step, name)).tolist() for name in ("mean", "std")}
    return told


def _of_processor(encoder):
    """Return what a processor of transformers says."""
    told = {"crop": None} | encoder.preprocessing()
    size = told["size"]
    return told | {"size": size["shortest_edge"] if "shortest_edge" in size else [size["height"], size["width"]]}


def _difference(theirs, ours, size):
    """Return how far the pixels of a made picture lie apart: the mean over them, of 255 levels."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    found, expected = ours(picture), theirs(picture).numpy()
    return np.abs((found - expected) * ours.std).mean() * 255 if found.shape == expected.shape else np.inf
