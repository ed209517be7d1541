"""Reading image files of any mode as plain RGB.

CLIP's own preprocessing resizes palette and 1-bit images before they become RGB, saturates 16-bit grey to white,
drops alpha on black and ignores EXIF rotation; so images become RGB here first. Plain RGB files stay exactly as they
are. Broken metadata never makes a picture unreadable.
"""

import contextlib
import io
import logging
import os
import re
import stat
import warnings

import PIL
from PIL import Image
from PIL.Image import Transpose

from features.kinds import HEAD, TIFF, is_heic, open_heic, what_else, without_metadata
from features.tars import TarMember
from utils.flags import MAX_PIXELS

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = dict(zip(range(2, 9), (
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
    Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
), strict=True))  # fmt: skip  # the tag's values -> what turns the image upright
MAX_RATIO = 100  # of the sides: CLIP scales the shorter one to its input, so a line of pixels would fill the memory

# words in a decoder's error -> what the user reads; any other error reads "damaged"
REASONS = (
    (re.compile("imagecodecs"), "a TIFF in a rare compression: convert it, or pip install imagecodecs"),
    (re.compile("truncat|not enough|broken data|unexpected end|premature|end of file"), "truncated"),
    (re.compile("support|unknown|unrecogni|not implemented"), "of a kind that is not known, or damaged"),
)

_max_pixels = MAX_PIXELS

# libraries' warnings about metadata and large pictures are silenced; the limit below is our own
warnings.filterwarnings("ignore", module=r"PIL\.")
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())
    logging.getLogger(_library).propagate = False


class ImageError(ValueError):
    """An image file that cannot be read; the message says why."""


def max_pixels():
    """Return how many pixels an image may have."""
    return _max_pixels


def set_max_pixels(number):
    """Let images have `number` pixels and no more; Pillow's own limit follows."""
    global _max_pixels
    _max_pixels = number
    Image.MAX_IMAGE_PIXELS = (number + 1) // 2  # Pillow refuses twice as many


def reader():
    """Return what decides which pictures can be read, as plain data: the decoders' versions and the pixel limit."""
    from importlib.metadata import version

    return [PIL.__version__, version("tifffile"), open_heic(), _max_pixels]


def is_readable(path):
    """Tell whether `read_image` can read a picture."""
    with contextlib.suppress(ImageError):
        read_image(path)
        return True
    return False


def read_image(path):
    """Read an image file as RGB.

    Args:
        path: file, or TarMember, of any format that Pillow or tifffile reads; of an animation or several pages, the
            first is read.
    Returns: PIL image of mode RGB, upright.
    Raises: ImageError where it is missing, truncated, no image, or too large.
    """
    head = b""
    try:
        if isinstance(path, TarMember):
            path = io.BytesIO(path.read_bytes())
            head = path.read(HEAD)
            return _decode(path, path, head)
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ImageError("a pipe or a device, not a file")  # opening it would wait for a writer
        with open(path, "rb") as file:
            head = file.read(HEAD)
            return _decode(path, file, head)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("a link to nothing" if os.path.islink(path) else "no such file") from None
    except IsADirectoryError:
        raise ImageError("a folder, not an image") from None
    except Image.DecompressionBombError:
        raise too_large() from None
    except Exception as error:  # decoders can raise anything on damaged files; every cause becomes a named skip
        raise ImageError(_reason(error, head)) from None


def _reason(error, head):
    """Say why a file that begins with `head` could not be read."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be opened: {os.strerror(error.errno).lower()}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    why = what_else(head)
    if not why and isinstance(error, Image.UnidentifiedImageError):
        why = "of no format that is known, or damaged"
    # decoders' own words may hold anything: bytes of the file, names and addresses of objects
    words = str(error).lower()
    why = why or next((reason for hint, reason in REASONS if hint.search(words)), "damaged")
    return f"not a readable image ({why})"


def _decode(path, file, head):
    """Read an open image file that begins with `head`; raises whatever decoders raise."""
    if head.startswith(TIFF):
        from features.tiff import read_tiff  # tifffile is slow to import

        return read_tiff(path)
    if is_heic(head):
        open_heic()
    try:
        return decode_with_pillow(file)
    except (ImageError, Image.DecompressionBombError):
        raise
    except Exception:
        file.seek(0)
        bare = without_metadata(file.read())
        if bare is None:
            raise
        return decode_with_pillow(io.BytesIO(bare))


def decode_with_pillow(file):
    """Read an image after checking the size that its header states: a small file may unpack to gigabytes.

    Args:
        file: path or open file.
    """
    with Image.open(file) as image:
        if image.format == "EPS":
            raise ValueError("PostScript")  # Pillow would run another program on it
        check_pixels(image.width, image.height)
        return to_rgb(image)


def check_pixels(width, height, depth=1):
    """Raise ImageError for an image that is larger than the limit; `depth` scales for pixels of many numbers."""
    if width * height * depth > _max_pixels:
        raise too_large(f"{width:,} x {height:,} is ")


def too_large(size=""):
    """Return the ImageError of an image that is larger than the limit."""
    return ImageError(f"{size}more than {_max_pixels:,} pixels, the limit that --max_pixels sets")


def to_rgb(image):
    """Return a PIL image of any mode as upright RGB; transparent pixels are composited over white.

    Raises: ImageError for one that is more than MAX_RATIO times as long as wide.
    """
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ImageError(f"{image.width} x {image.height} pixels: more than {MAX_RATIO} times as long as wide")
    # before load(), which reads all metadata of a TIFF; after it otherwise, as a PNG's may follow the pixels
    orientation = _take_orientation(image) if image.format == "TIFF" else None
    image.load()
    return _plain(turned(image, orientation or _take_orientation(image)))


def _take_orientation(image):
    """Return the EXIF orientation, 1 where none can be read; the image's EXIF is cleared."""
    orientation = 1
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        exif.clear()
    except Exception:  # broken metadata can raise anything
        return orientation
    return orientation


def turned(image, orientation):
    """Return an image upright, given its EXIF orientation."""
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _plain(image):
    """Return a loaded image of any mode as RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        from features.arrays import from_array  # numpy is slow to import

        return from_array(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
