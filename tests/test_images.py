"""Pictures as they come: odd metadata, many bands, large ones, other files under a picture's name."""

import io
import os
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from features import images, kinds
from features.images import ImageError, read_image

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # stored lying on its side
TOO_MUCH = zlib.compress(b"x" * 3_000_000)  # more than Pillow unpacks of a text


def picture():
    """A picture, 40 x 64."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 40, 3), dtype=np.uint8))


def saved(kind, **options):
    """Return the bytes of the picture in a format."""
    file = io.BytesIO()
    picture().save(file, kind, **options)
    return file.getvalue()


def png(kind, content, at=33, crc=None, **options):
    """Return a PNG with a chunk more, behind its header or `at` another place."""
    data = saved("PNG", **options)
    crc = zlib.crc32(kind + content) if crc is None else crc
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return data[:at] + chunk + data[at:]


def jpeg(number, content, **options):
    """Return a JPEG with an APP segment more."""
    data = saved("JPEG", **options)
    return data[:2] + b"\xff" + bytes([0xE0 + number]) + struct.pack(">H", len(content) + 2) + content + data[2:]


ODD = {
    "text.png": png(b"zTXt", b"workflow\0\0" + TOO_MUCH),
    "text behind.png": png(b"zTXt", b"workflow\0\0" + TOO_MUCH, at=-12),
    "other language.png": png(b"iTXt", b"a\0\1\0\0\0" + TOO_MUCH),
    "many texts.png": png(b"tEXt", b"a\0" + b"x" * 70_000_000),
    "profile.png": png(b"iCCP", b"a\0\0" + TOO_MUCH),
    "unknown profile.png": png(b"iCCP", b"a\0\7" + TOO_MUCH),
    "wrong sum.png": png(b"tEXt", b"a\0b", crc=1),
    "short gamma.png": png(b"gAMA", b"a"),
    "exif.png": png(b"eXIf", b"garbage"),
    "cut exif.png": png(b"eXIf", b"II*\0\x08\0\0\0\xff\xff", at=-12),
    "exif.webp": saved("WEBP", lossless=True, exif=b"Exif\0\0garbage", icc_profile=b"garbage", xmp=b"\xff\xfe"),
    "short profile.jpg": jpeg(2, b"ICC_PROFILE\0"),
    "pictures.jpg": jpeg(2, b"MPF\0garbage"),
    "photoshop.jpg": jpeg(13, b"Photoshop 3.0\x008BIM\x04\x04"),
    "exif.jpg": jpeg(1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "short adobe.jpg": jpeg(14, b"Adobe"),
    "profile.tif": saved("TIFF", icc_profile=b"garbage", tiffinfo={700: b"\xff\xfe"}),
}


@pytest.mark.parametrize("name", ODD)
def test_metadata_never_costs_a_picture(tmp_path, name):
    (tmp_path / name).write_bytes(ODD[name])
    read = np.asarray(read_image(tmp_path / name)).astype(int)
    plain = Image.open(io.BytesIO(saved("JPEG"))) if name.endswith("jpg") else picture()
    assert np.array_equal(read, np.asarray(plain))


def test_broken_exif_of_avif(tmp_path):
    pytest.importorskip("PIL._avif")
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = saved("AVIF", exif=exif, quality=100, subsampling="4:4:4")
    place = data.rindex(b"II*\0" if b"II*\0" in data else b"MM\0*")
    (tmp_path / "x.avif").write_bytes(data[:place] + b"none" + data[place + 4 :])
    assert np.abs(np.asarray(read_image(tmp_path / "x.avif")).astype(int) - np.asarray(picture())).mean() < 2


@pytest.mark.parametrize("options", ({"exif": SIDEWAYS}, {"exif": SIDEWAYS, "format": "TIFF"}))
def test_orientation_is_kept_beside_odd_metadata(tmp_path, options):
    if "format" in options:
        info = {0x0112: 6, 34665: 999_999}  # EXIF where the file has ended
        picture().save(tmp_path / "x.tif", tiffinfo=info)
        assert read_image(tmp_path / "x.tif").size == (64, 40)
        return
    (tmp_path / "x.png").write_bytes(png(b"zTXt", b"a\0\0" + TOO_MUCH, **options))
    (tmp_path / "x.jpg").write_bytes(jpeg(2, b"ICC_PROFILE\0", **options))
    assert read_image(tmp_path / "x.png").size == read_image(tmp_path / "x.jpg").size == (64, 40)


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"))
def test_real_damage_is_named(tmp_path, kind):
    data = saved(kind)
    (tmp_path / "x").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(tmp_path / "x")


class Unwell:
    """A decoder that fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (OSError("cannot identify image file <_io.BytesIO object at 0x7f1>"), "not a readable image (damaged)"),
        (RuntimeError(f"{Unwell(None)} failed"), "not a readable image (damaged)"),
        (ValueError("invalid literal for int() with base 10: b'25("), "not a readable image (damaged)"),
        (OSError("image file is truncated (4 bytes not processed)"), "not a readable image (truncated)"),
        (MemoryError(), "there is not enough memory for it"),
        (OSError(5, "Input/output error"), "cannot be opened: input/output error"),
    ),
)
def test_a_decoders_own_words_are_not_shown(tmp_path, monkeypatch, error, said):
    (tmp_path / "x.png").write_bytes(saved("PNG"))
    monkeypatch.setattr(images, "decode_with_pillow", Unwell(error))
    with pytest.raises(ImageError) as told:
        read_image(tmp_path / "x.png")
    assert str(told.value) == said


def test_large_pictures(tmp_path, monkeypatch):
    """A phone's 108 megapixels are read; what is larger than the limit names the flag."""
    Image.new("1", (12000, 9000), 1).save(tmp_path / "x.png")
    monkeypatch.setattr(images, "_max_pixels", images.max_pixels())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    images.set_max_pixels(images.MAX_PIXELS)
    assert read_image(tmp_path / "x.png").size == (12000, 9000)
    images.set_max_pixels(107_999_999)
    with pytest.raises(ImageError, match="more than 107,999,999 pixels, the limit that --max_pixels sets"):
        read_image(tmp_path / "x.png")


# ---- TIFF


def bands(number, dtype, planar):
    """Return [H, W, S] or [S, H, W]: red rises to the right, green downwards, blue is even; then other things."""
    red, green = np.meshgrid(np.arange(40) * 6, np.arange(32) * 7)
    pixels = np.stack([red, green, np.full_like(red, 100), 255 - red, 255 - green, red, green, red], -1)[..., :number]
    pixels = pixels / 255 if np.issubdtype(dtype, np.floating) else pixels * (257 if dtype == np.uint16 else 1)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0) if planar == "separate" else pixels).astype(dtype)


@pytest.mark.parametrize("compression", (None, "zlib"))
@pytest.mark.parametrize("planar", ("contig", "separate"))
@pytest.mark.parametrize("dtype", (np.uint8, np.uint16, np.float32))
@pytest.mark.parametrize("number", (3, 5, 8))
def test_first_three_bands_of_an_rgb_tiff(tmp_path, number, dtype, planar, compression):
    tifffile.imwrite(
        tmp_path / "x.tif", bands(number, dtype, planar), photometric="rgb", planarconfig=planar,
        compression=compression, metadata=None,
    )  # fmt: skip
    read = np.asarray(read_image(tmp_path / "x.tif"))
    assert np.array_equal(read, bands(3, np.uint8, "contig"))


@pytest.mark.parametrize("compression", (None, "zlib"))
@pytest.mark.parametrize("planar", ("contig", "separate"))
@pytest.mark.parametrize("number", (4, 8))
def test_bands_of_which_none_is_a_colour(tmp_path, number, planar, compression):
    """Neither a row of pixels nor the first band alone is taken for the picture."""
    tifffile.imwrite(
        tmp_path / "x.tif", bands(number, np.uint8, planar), photometric="minisblack", planarconfig=planar,
        compression=compression,
    )  # fmt: skip
    with pytest.raises(ImageError, match=f"a TIFF of {number} bands"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("dtype", (np.uint8, np.uint16))
def test_grey_tiffs(tmp_path, dtype):
    """Two bands are grey and something else; white may be zero; pages are not bands."""
    grey = bands(3, np.uint8, "contig")[..., :1].repeat(3, -1)
    for planar in ("contig", "separate"):
        two = bands(2, dtype, planar)
        tifffile.imwrite(tmp_path / "2.tif", two, photometric="minisblack", planarconfig=planar, compression="zlib")
        assert np.array_equal(np.asarray(read_image(tmp_path / "2.tif")), grey)
    one = bands(1, dtype, "contig")[..., 0]
    tifffile.imwrite(tmp_path / "white.tif", one, photometric="miniswhite")
    assert np.array_equal(np.asarray(read_image(tmp_path / "white.tif")), 255 - grey)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([one] + [one * 0] * 7), photometric="minisblack")
    assert np.array_equal(np.asarray(read_image(tmp_path / "pages.tif")), grey)


def smooth():
    """A picture without edges, 40 x 32, so that colour may be stored coarsely."""
    return Image.fromarray(bands(3, np.uint8, "contig"))


def ycbcr_blocks(across, down):
    """Return the uncompressed bytes of the smooth picture, its colour stored for blocks of pixels."""
    pixels = np.asarray(smooth().convert("YCbCr"))
    blocks = pixels.reshape(32 // down, down, 40 // across, across, 3).swapaxes(1, 2)
    colour = blocks[..., 1:].mean((2, 3)).round().astype(np.uint8)
    return np.concatenate([blocks[..., 0].reshape(*blocks.shape[:2], -1), colour], -1).tobytes()


def tiff(data, tags):
    """Return a TIFF file of one strip.

    Args:
        tags: {number: value, or two values of 16 bits}, beside the size.
    """
    size = {256: 40, 257: 32, 273: 8, 278: 32, 279: len(data)}
    entries = b""
    for number, value in sorted((size | tags).items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack("<HH", *values) if len(values) == 2 else struct.pack("<I", *values)
        entries += struct.pack("<HHI", number, 3 if len(values) == 2 else 4, len(values)) + packed
    count = struct.pack("<H", len(size | tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + count + entries + bytes(4)


def assert_close(path, expected, by=4):
    difference = np.asarray(read_image(path)).astype(int) - np.asarray(expected.convert("RGB"))
    assert np.abs(difference).mean() < by


@pytest.mark.parametrize("compression", ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"))
@pytest.mark.parametrize("mode", ("YCbCr", "CMYK", "LAB", "RGB", "L", "1"))
def test_colours_of_tiffs(tmp_path, mode, compression):
    if (mode, compression) == ("1", "jpeg"):
        pytest.skip("JPEG has no single bits")
    image = smooth().convert(mode)
    for strips in ({}, {"strip_size": 960}):
        image.save(tmp_path / "x.tif", compression=compression, **strips)
        expected = smooth() if mode in ("YCbCr", "LAB") else image
        assert_close(tmp_path / "x.tif", expected, 12 if compression == "jpeg" else 4)


@pytest.mark.parametrize("blocks", ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)))
def test_coarse_colour_of_a_tiff(tmp_path, blocks):
    data, tags = ycbcr_blocks(*blocks), {258: 8, 259: 1, 262: 6, 277: 3, 530: blocks}
    (tmp_path / "x.tif").write_bytes(tiff(data, tags))
    assert_close(tmp_path / "x.tif", smooth(), 8)
    (tmp_path / "x.tif").write_bytes(tiff(data[:-100], tags))
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("layout", ({"tile": (16, 16)}, {"planarconfig": "separate"}, {}))
@pytest.mark.parametrize("dtype", (np.uint8, np.uint16))
@pytest.mark.parametrize("kind", ("ycbcr", "cielab", "icclab"))
def test_rare_layouts_of_colour(tmp_path, kind, dtype, layout):
    pixels = np.frombuffer(smooth().convert("YCbCr" if kind == "ycbcr" else "LAB").tobytes(), np.uint8)
    pixels = pixels.reshape(32, 40, 3) ^ np.uint8([0, 128, 128] if kind == "icclab" else [0, 0, 0])
    pixels = pixels.astype(dtype) * (257 if dtype == np.uint16 else 1)
    pixels = np.moveaxis(pixels, -1, 0) if "planarconfig" in layout else pixels
    options = {"subsampling": (1, 1)} if kind == "ycbcr" else {}
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=kind, **layout, **options)
    assert_close(tmp_path / "x.tif", smooth())


def test_twelve_bits(tmp_path):
    grey = np.asarray(smooth().convert("L")).astype(np.uint16) << 4
    first, second = grey[:, ::2], grey[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    (tmp_path / "x.tif").write_bytes(tiff(packed.tobytes(), {258: 12, 259: 1, 262: 1, 277: 1}))
    assert_close(tmp_path / "x.tif", smooth().convert("L"), 1)


def test_tiffs_that_are_no_pictures(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(bytes(40 * 32), {258: 8, 259: 1, 262: 32803, 277: 1}))
    with pytest.raises(ImageError, match="a TIFF of kind CFA, not a picture: save it as RGB"):
        read_image(tmp_path / "x.tif")


# ---- files that are no pictures

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
NO_PICTURES = {
    "HEIC: convert it, or pip install pillow-heif": HEIC,
    "a drawing \\(SVG\\).*PNG": b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "an HTML page: downloaded": b"\xef\xbb\xbf\n<!DOCTYPE html><html><svg></svg></html>",
    "an XML text": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "an empty file": b"",
    "only zero bytes": bytes(3000),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3",
    "a video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(100),
    "a video: take": b"\x1aE\xdf\xa3" + bytes(100),
    "run git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "JPEG XL": b"\xff\x0a" + bytes(50),
    "camera's raw data": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(50),
    "AppleDouble": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60),
    "\\(a text\\)": '{"error": "é"}'.encode() + b"x" * 2000,
    "of no format that is known": b"\x01\x02\x03\xff" * 50,
}


@pytest.mark.parametrize("what", NO_PICTURES)
def test_other_files_are_told_apart(tmp_path, what):
    (tmp_path / "x.jpg").write_bytes(NO_PICTURES[what])
    with pytest.raises(ImageError, match=f"not a readable image .*{what}"):
        read_image(tmp_path / "x.jpg")


def test_heic_is_read_where_its_library_is_there(tmp_path, monkeypatch):
    """The library tells Pillow how; a stand-in does it here."""
    (tmp_path / "x.heic").write_bytes(HEIC)

    def opener():
        Image.register_open("HEIF", lambda *_: Image.open(io.BytesIO(saved("PNG"))), lambda head: head[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=opener))
    kinds.open_heic.cache_clear()
    try:
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.heic")), np.asarray(picture()))
    finally:
        kinds.open_heic.cache_clear()
        Image.OPEN.pop("HEIF")
        Image.ID.remove("HEIF")


def test_what_is_no_file(tmp_path):
    """None of these waits, and each is named."""
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("none", tmp_path / "dangling.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, said in (
        ("pipe.jpg", "a pipe or a device"),
        ("dangling.jpg", "a link to nothing"),
        ("loop.jpg", "cannot be opened: too many levels of symbolic links"),
        ("folder.jpg", "a folder"),
        ("none.jpg", "no such file"),
    ):
        with pytest.raises(ImageError, match=said):
            read_image(tmp_path / name)
