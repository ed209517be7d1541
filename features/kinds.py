"""Kinds of files, told by their first bytes; and pictures without their metadata."""

import functools
import re
import zlib

HEAD = 1024  # first bytes that are looked at; an SVG's comments may precede its tag
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = (
    *TIFF, PNG, b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS", b"\0\0\1\0",
    b"\xff\x0a", b"\0\0\0\x0cJXL ",
)  # fmt: skip
BITMAP = re.compile(rb"BM....\0\0\0\0|RIFF....WEBP|P[1-6]\s+(#.*\s+)*\d", re.DOTALL)
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
CAMERA = (b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FOVb")
OTHERS = (  # what downloads and folders may hold in place of a picture, and what helps
    (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
    (b"\0\5\x16\7", "macOS's own data on a file (AppleDouble)"),
    (b"%PDF", "a PDF: export its pages as PNG"),
    (b"%!PS", "a drawing (PostScript): export it as PNG"),
    (b"\xc5\xd0\xd3\xc6", "a drawing (PostScript): export it as PNG"),
    (b"PK\3\4", "a zip archive or a document"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"\xff\x0a", "JPEG XL: convert it to JPEG or PNG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL: convert it to JPEG or PNG"),
    (b"\x1aE\xdf\xa3", "a video: take a frame of it"),
    (b"FLV\1", "a video: take a frame of it"),
    (b"\0\0\1\xba", "a video: take a frame of it"),
    (b"\0\0\1\xb3", "a video: take a frame of it"),
    *((mark, "a camera's raw data: develop it to JPEG or PNG") for mark in CAMERA),
)


def is_picture(head):
    """Tell whether a file that begins with `head` is a picture, of a kind that can be read or at least named."""
    return head.startswith(PICTURES) or bool(BITMAP.match(head)) or bool(_brands(head) & (HEIC | AVIF))


def what_else(head):
    """Say what a file that cannot be read as an image is, and what helps; None where that is not known."""
    if not head.strip(b"\0"):
        return "only zero bytes: an interrupted copy or download" if head else "an empty file"
    if head[4:8] == b"ftyp":
        return _boxed(_brands(head))
    for mark, remedy in OTHERS:
        if head.startswith(mark):
            return remedy
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "a video: take a frame of it"
    return _text(head)


def _brands(head):
    """Return the brands that an ISO media file (HEIC, AVIF, MP4) declares."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}


def _boxed(brands):
    """Say what an ISO media file is, and what helps; None where it can be read."""
    if brands & AVIF:
        from PIL import features as pillow

        return None if pillow.check("avif") else "AVIF: convert it, or pip install --upgrade pillow"
    if brands & HEIC:
        return None if open_heic() else "HEIC: convert it, or pip install pillow-heif"
    if b"crx " in brands:
        return "a camera's raw data: develop it to JPEG or PNG"
    return "a video: take a frame of it"


@functools.cache
def open_heic():
    """Let Pillow read HEIC, where pillow-heif is installed; returns whether it does."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_heic(head):
    """Tell whether a file is HEIC."""
    return bool(_brands(head) & HEIC) and not _brands(head) & AVIF


def _text(head):
    """Say what kind of text a file is; None where it is none."""
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = head[: len(head) // 2 * 2].decode("utf-16") if wide else head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < HEAD - 3:  # not a character cut by HEAD
            return None
        text = head[: error.start].decode("utf-8-sig")
    text = text.lstrip().lower()
    if any(letter < " " and not letter.isspace() for letter in text):
        return None
    if re.match(r"<!doctype html|<html|<head|<body|<script|<meta|<title", text) or "<html" in text[:200]:
        return "an HTML page: downloaded without a session?"
    if text.startswith("<") and ("<svg" in text or "<!doctype svg" in text):
        return "a drawing (SVG): export it as PNG"
    if text.startswith("<"):
        return "an XML text: a server's error?"
    return "a text"


def without_metadata(data):
    """Return a picture's bytes without its metadata, for files whose metadata Pillow cannot read.

    Args:
        data: bytes of a PNG, JPEG, AVIF or HEIC file.
    Returns: bytes; the orientation of EXIF stays in PNG and JPEG. None for other formats.
    """
    if data.startswith(PNG):
        return _bare_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data)
    if data[4:8] == b"ftyp":
        return re.sub(rb"(infe[\2\3].{7,9})Exif", rb"\1none", data, count=1, flags=re.DOTALL)
    return None


def _bare_png(data):
    """Keep the chunks that make the picture, and EXIF where it is intact."""
    parts, start = [PNG], len(PNG)
    while start + 12 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        chunk = data[start : start + 12 + length]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") and intact:  # a capital marks a critical chunk
            parts.append(chunk)
        start += 12 + length
    return b"".join([*parts, data[start:]])


def _bare_jpeg(data):
    """Keep the segments that decoding needs (tables, JFIF's and Adobe's colour information) and EXIF."""
    parts, start = [data[:2]], 2
    while data[start : start + 1] == b"\xff" and (marker := data[start + 1 : start + 2]) != b"\xda":
        if marker == b"\xff":  # a fill byte
            start += 1
            continue
        length = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start : start + length]
        is_metadata = b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"
        needed = marker == b"\xe0" and length >= 16 or marker == b"\xee" and length >= 14
        if not is_metadata or needed or segment[4:10] == b"Exif\0\0":
            parts.append(segment)
        start += length
    return b"".join([*parts, data[start:]])
