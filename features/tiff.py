"""Reading TIFF files, whose bands may be many, of any number type, and lie in any order.

Axes: H height, W width, S samples (bands) of a pixel.
"""

import numpy as np
import tifffile
from PIL import UnidentifiedImageError
from tifffile import PHOTOMETRIC, PLANARCONFIG

from features.images import ImageError, check_pixels, decode_with_pillow, from_array, turned

GREY, INVERTED, RGB, PALETTE, CMYK = (
    PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED
)  # fmt: skip
COLOURS = {GREY: 1, INVERTED: 1, PALETTE: 1, RGB: 3, CMYK: 4}  # bands that make the colour; further ones are extra
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of alpha among the extra ones
ORIENTATION = 274  # tag


def read_tiff(path):
    """Read the first page of a TIFF file as RGB.

    Pillow knows most compressions; what it takes for less or for other than it is, tifffile reads.

    Args:
        path: file.
    Returns: PIL image of mode RGB, upright.
    Raises: ImageError where the bands are no picture's, or the image is too large; else what the two raise.
    """
    try:
        file = tifffile.TiffFile(path)
        page = file.pages[0]
    except Exception:  # a directory that only Pillow can make sense of, or none
        return decode_with_pillow(path)
    with file:
        check_pixels(page.imagewidth, page.imagelength, max(1, page.size // page.imagewidth // page.imagelength // 4))
        if page.samplesperpixel > 3 and page.photometric not in (RGB, CMYK):
            kind = f"{page.samplesperpixel} bands ({getattr(page.photometric, 'name', page.photometric)})"
            raise ImageError(f"a TIFF of {kind}, not a picture: save three of them as RGB")
        if _is_plain(page):
            return _first_that_knows(lambda: decode_with_pillow(path), lambda: _read_page(page))
        if page.planarconfig != PLANARCONFIG.CONTIG:
            return _read_page(page)  # Pillow gives other pixels without a word
        return _first_that_knows(lambda: _read_page(page), lambda: decode_with_pillow(path))


def _first_that_knows(read, read_otherwise):
    """Return what `read` makes of a page, or what the other does where its kind is unknown to the first.

    Raises: what `read` raises where the page is damaged, for another reader might take it for whole.
    """
    try:
        return read()
    except (UnidentifiedImageError, ValueError) as error:
        if isinstance(error, ValueError) and "imagecodecs" not in str(error):  # what tifffile lacks
            raise
        try:
            return read_otherwise()
        except Exception:
            raise error from None


def _is_plain(page):
    """Tell whether Pillow reads all of a page, and right: not so 16-bit planes, white zeros, one band of several."""
    if page.photometric in (GREY, INVERTED):
        return page.samplesperpixel == 1 and (page.photometric == GREY or page.bitspersample <= 8)
    return page.bitspersample <= 8


def _read_page(page):
    """Return a page, decoded by tifffile, as RGB."""
    array = page.asarray().reshape(page.shaped)[:, 0]  # [S or 1, H, W, 1 or S], of the first depth
    array = array[0] if page.shaped[0] == 1 else np.moveaxis(array[..., 0], 0, -1)  # [H, W, S]
    if page.photometric == PALETTE:
        array = np.moveaxis(page.colormap[:, array[..., 0]], 0, -1)
    elif page.photometric == INVERTED:
        array = _inverted(array, page)
    # three bands that are called grey are RGB: GDAL writes 16-bit pictures so
    colours = 3 if array.shape[-1] == 3 else COLOURS.get(page.photometric, array.shape[-1])
    alpha = page.extrasamples[:1]
    with_alpha = colours in (1, 3) and array.shape[-1] > colours and alpha and alpha[0] in (ASSOCIATED, UNASSOCIATED)
    mode = {1: "La", 3: "RGBa"}[colours] if with_alpha and alpha[0] == ASSOCIATED else None
    mode = "CMYK" if page.photometric == CMYK else mode
    image = from_array(array[..., : colours + bool(with_alpha)], mode)
    tag = page.tags.get(ORIENTATION)
    return turned(image, tag.value if tag else 1)


def _inverted(array, page):
    """Return an array whose zeros are white the other way round; extra bands stay."""
    if np.issubdtype(array.dtype, np.floating):
        return array
    top = ~array.dtype.type(0) if array.dtype != bool else True
    colours = 1 if array.shape[-1] != 3 else 3
    return np.concatenate([top ^ array[..., :colours], array[..., colours:]], -1)
