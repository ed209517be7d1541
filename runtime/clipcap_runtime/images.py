"""Image files of any mode -> upright RGB -> an encoder's pixels: as ClipCap's features/images.py and torchvision do."""

import contextlib
import os
import re
import stat
import warnings

import numpy as np
from PIL import Image
from PIL.Image import Transpose

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = dict(zip(range(2, 9), (
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
    Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
), strict=True))  # fmt: skip
MAX_RATIO = 100  # of the sides
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow itself refuses
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR, BITS = 259, 262, 277, 284, 258  # TIFF's tags
GREY, INVERTED, YCBCR, LAB, ICCLAB = 1, 0, 6, 8, 9  # kinds of TIFF
RARE = "a TIFF of a rare kind: convert it to PNG"
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """An image file that cannot be read; the message says why."""


def read_image(path):
    """Read an image file as upright RGB; raises ImageError where it is none, or one that Pillow alone reads wrong."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("a folder, a pipe or a device, not a file")
        with open(path, "rb") as file:
            tiff = file.read(4) in TIFF
            file.seek(0)
            with Image.open(file) as image:
                if image.format == "EPS":
                    raise ImageError("not a readable image (a drawing (PostScript): export it as PNG)")
                return _read_tiff(image) if tiff else to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("a link to nothing" if os.path.islink(path) else "no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise whatever they like on damaged files
        if isinstance(error, OSError) and error.errno:
            raise ImageError(f"cannot be opened: {os.strerror(error.errno).lower()}") from None
        cut = re.search("truncat|not enough|broken data|unexpected end|premature|end of file", str(error).lower())
        kind = "truncated" if cut else "of no format that is known, or damaged"
        raise ImageError(f"not a readable image ({kind})") from None


def _read_tiff(image):
    """Read a TIFF that Pillow reads right; ClipCap itself reads the others with tifffile."""
    tags = image.tag_v2
    kind, samples, bits = tags.get(PHOTOMETRIC), tags.get(SAMPLES, 1), tags.get(BITS, (1,))
    if kind == GREY and bits == (12,):
        return turned(from_array(np.asarray(image) << 4), image.getexif().get(ORIENTATION, 1))
    plain = len(set(bits)) == 1 and bits[0] <= 8
    if kind in (GREY, INVERTED):
        plain = samples == 1 and (kind == GREY or bits[0] <= 8)
    elif kind in (YCBCR, LAB, ICCLAB):
        plain &= tags.get(PLANAR, 1) == 1 and (kind, tags.get(COMPRESSION, 1)) != (YCBCR, 1) and kind != ICCLAB
    if not plain or kind not in (GREY, INVERTED, 2, 3, 5, YCBCR, LAB) or (samples > 3 and kind not in (2, 5)):
        raise ImageError(RARE)
    return to_rgb(image)


def to_rgb(image):
    """Return a PIL image of any mode as upright RGB; alpha is laid over white."""
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ImageError(f"{image.width} x {image.height} pixels: more than {MAX_RATIO} times as long as wide")
    # a TIFF's load() reads all of its metadata; a PNG's may come behind the pixels
    orientation = _take_orientation(image) if image.format == "TIFF" else None
    image.load()
    return _plain(turned(image, orientation or _take_orientation(image)))


def _take_orientation(image):
    """Return the EXIF orientation, 1 where there is none, and clear the image's EXIF."""
    orientation = 1
    with contextlib.suppress(Exception):  # broken metadata raises whatever it likes
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        exif.clear()
    return orientation


def turned(image, orientation):
    """Return an image upright, given its EXIF orientation."""
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _plain(image):
    """Return a loaded image of any mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def from_array(array):
    """Return pixels [H, W] or [H, W, 1..4] of any numeric type as an RGB image; raises ImageError for other shapes."""
    array = np.asarray(array)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.shape[-1] > 4:
        raise ImageError(f"shape {array.shape} is no image")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = _to_bytes(array.astype(np.float64), np.issubdtype(array.dtype, np.floating), array.dtype.itemsize)
    bands = [Image.fromarray(np.ascontiguousarray(array[..., band])) for band in range(array.shape[-1])]
    return to_rgb(Image.merge(("L", "LA", "RGB", "RGBA")[len(bands) - 1], bands))


def _to_bytes(values, floating, itemsize):
    """Scale numbers to 0..255: integers from their full range, floats from 0..1 or their own minimum..maximum."""
    values = np.nan_to_num(values)
    low, high = values.min(), values.max()
    if floating:
        low, high = (0, 1) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high < 2**16:
        low, high = 0, 255 if itemsize > 2 and high < 2**8 else 2**16 - 1
    return np.uint8(np.round((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255))


class Preprocess:
    """An RGB image -> [3, H, W] pixels, as torchvision's Resize, CenterCrop, ToTensor and Normalize."""

    def __init__(self, size, interpolation, crop, mean, std):
        """Take what captioner.json says; `size`: the shorter side, or [H, W]; size or crop may be None."""
        self.size, self.crop = size, crop
        self.how = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}.get(interpolation)
        self.mean, self.std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))

    def __call__(self, image):
        width, height = image.size
        if isinstance(self.size, int):
            long = int(self.size * max(width, height) / min(width, height))
            width, height = (self.size, long) if width <= height else (long, self.size)
        elif self.size:
            height, width = self.size
        image = image.resize((width, height), self.how)
        if self.crop:
            down, across = self.crop
            # a crop larger than the image is padded with black, with the odd pixel at the right and at the bottom
            left = -((across - width) // 2) if across > width else round((width - across) / 2)
            top = -((down - height) // 2) if down > height else round((height - down) / 2)
            image = image.crop((left, top, left + across, top + down))
        pixels = np.asarray(image, np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return (pixels - self.mean) / self.std
