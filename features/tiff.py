"""Reading TIFF files, which may have many bands, of any dtype and in any layout.

Axes: H height, W width, S samples (bands) of a pixel.
"""

import math

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from features.arrays import from_array
from features.images import ImageError, check_pixels, decode_with_pillow, turned

GREY, INVERTED, RGB, PALETTE, CMYK, YCBCR, CIELAB, ICCLAB = (
    PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED,
    PHOTOMETRIC.YCBCR, PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB,
)  # fmt: skip
LAB = (CIELAB, ICCLAB)
# bands that make the colour; further ones are extra
COLOURS = {GREY: 1, INVERTED: 1, PALETTE: 1, RGB: 3, CMYK: 4, YCBCR: 3, CIELAB: 3, ICCLAB: 3}
MODES = {CMYK: "CMYK", YCBCR: "YCbCr", CIELAB: "LAB", ICCLAB: "LAB"}  # PIL's names of bands that are not grey or RGB
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of alpha among the extra ones
ORIENTATION = 274  # tag


def read_tiff(path):
    """Read the first page of a TIFF file as RGB.

    Pillow knows most compressions; tifffile reads what Pillow would decode incompletely or wrongly.

    Args:
        path: file.
    Returns: PIL image of mode RGB, upright.
    Raises: ImageError where the bands are no picture's, or the image is too large; else what Pillow or tifffile raises.
    """
    try:
        file = tifffile.TiffFile(path)
        page = file.pages[0]
    except Exception:  # Pillow alone may be able to read it
        return decode_with_pillow(path)
    with file:
        check_pixels(page.imagewidth, page.imagelength, max(1, page.size // page.imagewidth // page.imagelength // 4))
        kind = getattr(page.photometric, "name", page.photometric)
        if page.photometric not in COLOURS:  # a camera's raw data, heights, masks
            raise ImageError(f"a TIFF of kind {kind}, not a picture: save it as RGB")
        if page.samplesperpixel > 3 and page.photometric not in (RGB, CMYK):
            number = page.samplesperpixel
            raise ImageError(f"a TIFF of {number} bands ({kind}), not a picture: save three of them as RGB")
        if page.photometric == GREY and page.bitspersample == 12:
            return _read_twelve_bits(path)
        if _is_plain(page):
            return _first_that_knows(lambda: decode_with_pillow(path), lambda: _read_page(page))
        if page.planarconfig != PLANARCONFIG.CONTIG:
            return _read_page(page)  # Pillow silently gives wrong pixels
        return _first_that_knows(lambda: _read_page(page), lambda: decode_with_pillow(path))


def _first_that_knows(read, read_otherwise):
    """Return what `read` returns, or `read_otherwise` where `read` does not know this kind of page.

    Raises: what `read` raises where the page is damaged, for the other reader might not notice the damage.
    """
    try:
        return read()
    except (UnidentifiedImageError, ValueError) as error:
        if isinstance(error, ValueError) and "imagecodecs" not in str(error):  # codecs that tifffile lacks
            raise
        try:
            return read_otherwise()
        except Exception:
            raise error from None


def _is_plain(page):
    """Tell whether Pillow reads a page correctly, unlike 16-bit planes, white zeros or one band of several."""
    if page.photometric in (GREY, INVERTED):
        return page.samplesperpixel == 1 and (page.photometric == GREY or page.bitspersample <= 8)
    if page.photometric in (YCBCR, *LAB) and (
        page.planarconfig != PLANARCONFIG.CONTIG
        or (page.photometric, page.compression) == (YCBCR, COMPRESSION.NONE)
        or page.photometric == ICCLAB
    ):
        return False
    return isinstance(page.bitspersample, int) and page.bitspersample <= 8


def _read_page(page):
    """Return a page, decoded by tifffile, as RGB."""
    if _has_blocks(page):
        array = _read_blocks(page)
    else:
        array = page.asarray().reshape(page.shaped)[:, 0]  # [S or 1, H, W, 1 or S], of the first depth
        array = array[0] if page.shaped[0] == 1 else np.moveaxis(array[..., 0], 0, -1)  # [H, W, S]
    if page.photometric in LAB:
        array = _eight_bit_lab(array, page)
    elif page.photometric == PALETTE:
        array = np.moveaxis(page.colormap[:, array[..., 0]], 0, -1)
    elif page.photometric == INVERTED:
        array = _inverted(array, page)
    # three bands that are called grey are RGB: GDAL writes 16-bit pictures so
    colours = 3 if array.shape[-1] == 3 else COLOURS.get(page.photometric, array.shape[-1])
    alpha = page.extrasamples[:1]
    with_alpha = colours in (1, 3) and array.shape[-1] > colours and alpha and alpha[0] in (ASSOCIATED, UNASSOCIATED)
    mode = {1: "La", 3: "RGBa"}[colours] if with_alpha and alpha[0] == ASSOCIATED else None
    image = from_array(array[..., : colours + bool(with_alpha)], MODES.get(page.photometric, mode))
    tag = page.tags.get(ORIENTATION)
    return turned(image, tag.value if tag else 1)


def _read_twelve_bits(path):
    """Return a grey picture of 12 bits, which Pillow unpacks and tifffile does not, as RGB."""
    with Image.open(path) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        return turned(from_array(np.asarray(image) << 4), orientation)


def _has_blocks(page):
    """Tell whether a page is of uncompressed YCbCr, whose chroma may be stored per block of pixels."""
    plain = (page.photometric, page.compression, page.bitspersample) == (YCBCR, COMPRESSION.NONE, 8)
    return plain and not page.is_tiled and page.planarconfig == PLANARCONFIG.CONTIG


def _read_blocks(page):
    """Return the pixels of a page whose chroma is stored per block of pixels, [H, W, 3] YCbCr.

    Strips are rows of blocks; a block is the brightness of each of its pixels, then Cb and Cr.
    Source: TIFF 6.0, section 21; a file with room for every pixel's colour has blocks of one, whatever it says.
    Raises: ImageError where it is truncated.
    """
    is_full_size = sum(page.databytecounts) >= 3 * page.imagewidth * page.imagelength
    across, down = (1, 1) if is_full_size else page.subsampling or (2, 2)
    height, width = page.imagelength, page.imagewidth
    wide, high = math.ceil(width / across), math.ceil(height / down)  # in blocks
    strips = page.parent.filehandle.read_segments(page.dataoffsets, page.databytecounts, sort=False)
    data = b"".join(strip or b"" for strip, _ in strips)
    size = across * down + 2
    if len(data) < wide * high * size:
        raise ImageError("truncated")
    blocks = np.frombuffer(data, np.uint8, wide * high * size).reshape(high, wide, size)
    light = blocks[..., :-2].reshape(high, wide, down, across).swapaxes(1, 2).reshape(high * down, wide * across)
    colour = blocks[..., -2:].repeat(down, 0).repeat(across, 1)  # [H, W, 2]
    return np.concatenate([light[..., None], colour], -1)[:height, :width]


def _eight_bit_lab(array, page):
    """Return L, a and b as bytes with 128 for a grey's a and b, as PIL has them."""
    if array.dtype.itemsize > 2 or np.issubdtype(array.dtype, np.floating):
        raise ImageError("a TIFF of L*a*b* in numbers of more than 16 bits: save it as RGB")
    array = array.astype(np.uint8) if array.dtype.itemsize == 1 else (array.astype(np.uint16) >> 8).astype(np.uint8)
    return array ^ np.uint8([0, 128, 128] if page.photometric == CIELAB else [0, 0, 0])


def _inverted(array, page):
    """Return an array whose zeros are white inverted, so that they are black; extra bands stay."""
    if np.issubdtype(array.dtype, np.floating):
        return array
    top = ~array.dtype.type(0) if array.dtype != bool else True
    colours = 1 if array.shape[-1] != 3 else 3
    return np.concatenate([top ^ array[..., :colours], array[..., colours:]], -1)
