"""Reading image files of any mode as plain RGB.

CLIP's own preprocessing resizes palette and 1-bit images before they become RGB, saturates 16-bit grey to white,
drops alpha on black and ignores EXIF rotation; so images become RGB here first. Plain RGB files stay exactly as they
are.
"""

import warnings

import numpy as np
import skimage.io
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
ORIENTATION = 0x0112  # EXIF tag
MAX_RATIO = 100  # of the sides: CLIP scales the shorter one to its input, so a line of pixels would fill the memory
TOO_LARGE = "more than {:,} pixels"


class ImageError(ValueError):
    """An image file that cannot be read; the message says why."""


def read_image(path):
    """Read an image file as RGB.

    Args:
        path: file of any format that Pillow or scikit-image reads; of an animation, the first frame.
    Returns: PIL image of mode RGB, upright.
    Raises: ImageError where it is missing, truncated, no image, or too large to be one.
    """
    try:
        return _decode(path)
    except ImageError:
        raise
    except tifffile.TiffFileError:
        raise ImageError("not a readable image (of no format that is known, or damaged)") from None
    except Image.DecompressionBombError:
        raise ImageError(TOO_LARGE.format(Image.MAX_IMAGE_PIXELS)) from None
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except IsADirectoryError:
        raise ImageError("a folder, not an image") from None
    except Exception as error:  # decoders raise whatever they like on damaged files; every cause becomes a named skip
        reason = str(error).split(str(path))[0].strip(" :'\"") or type(error).__name__
        raise ImageError(f"not a readable image ({' '.join(reason.split())[:100]})") from None


def _decode(path):
    """Read an image file after checking the size that its header states: a small file may unpack to gigabytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below refuses the same
            image = Image.open(path)
    except UnidentifiedImageError:
        with tifffile.TiffFile(path) as file:  # what scikit-image reads and Pillow does not
            _check_pixels(file.series[0].size // min(file.pages[0].samplesperpixel, 4))  # of all pages
        return from_array(skimage.io.imread(path))
    with image:
        _check_pixels(image.width * image.height)
        return to_rgb(image)


def _check_pixels(count):
    if Image.MAX_IMAGE_PIXELS and count > Image.MAX_IMAGE_PIXELS:
        raise ImageError(TOO_LARGE.format(Image.MAX_IMAGE_PIXELS))


def to_rgb(image):
    """Return a PIL image of any mode as upright RGB; alpha is laid over white.

    Raises: ImageError for one that is more than MAX_RATIO times as long as wide.
    """
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ImageError(f"{image.width} x {image.height} pixels: more than {MAX_RATIO} times as long as wide")
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def from_array(array):
    """Return pixels of any numeric type as an RGB image.

    Args:
        array: [H, W] or [H, W, 1..4]; integers use their full range (16 bit: 0..65535; 32-bit integers that stay
            below 65536 count as 16 bit, below 256 as 8 bit), floats 0..1 or else their own minimum..maximum.
    Returns: PIL image of mode RGB.
    Raises: ImageError for other shapes.
    """
    array = np.asarray(array)
    while array.ndim > 3 or (array.ndim == 3 and array.shape[-1] > 4):
        array = array[0]  # pages or frames: the first
    if array.ndim not in (2, 3) or not array.size:
        raise ImageError(f"shape {array.shape} is no image")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = _to_bytes(array.astype(np.float64), np.issubdtype(array.dtype, np.floating), array.dtype.itemsize)
    if array.ndim == 3 and array.shape[-1] in (1, 2):
        array = array[..., 0]
    return to_rgb(Image.fromarray(array))


def _to_bytes(values, floating, itemsize):
    """Scale numbers to 0..255."""
    values = np.nan_to_num(values)
    low, high = values.min(), values.max()
    if floating:
        low, high = (0, 1) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high < 2**16:
        low, high = 0, 255 if itemsize > 2 and high < 2**8 else 2**16 - 1
    return np.uint8(np.round((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255))
