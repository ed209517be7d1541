"""Tars of pictures as img2dataset and webdataset write them: members of one key are a picture and its captions.

The key is a member's name without its last ending. `.jpg`, `.png` and the like is the picture, `.txt` a caption, and
`.json` holds `caption`, one or a list, or `captions`. Nothing is unpacked: a picture is read where it lies in the tar,
so a resumed run finds the same bytes, and a member's name is never used as a path.
"""

import glob
import itertools
import json
import os
import re
import tarfile
from typing import NamedTuple

from features.listing import IMAGE_SUFFIXES, as_text

TEXTS = (".txt", ".json")
COMPRESSED = re.compile(r"\.(tar\.|t)(gz|bz2?|xz|lzma|zst|Z)$", re.IGNORECASE)
BRACE = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MOST_TARS = 1_000_000  # that braces may name
LONGEST_NAME = 1000  # characters
LARGEST_PICTURE, LARGEST_TEXT = 1 << 30, 1 << 20  # bytes
BLOCK = 512


class TarMember(NamedTuple):
    """A picture in a tar, in the place of an image file.

    Args:
        tar: its path.
        name: the member's.
        offset: of its first byte in the tar.
        size: in bytes.
        changed: when the tar was written, in ns.
    """

    tar: str
    name: str
    offset: int
    size: int
    changed: int

    def __fspath__(self):
        return f"{self.tar}/{self.name}"

    __str__ = __fspath__

    def fingerprint(self):
        """Return what tells whether it is still the picture that was encoded."""
        return as_text(self), self.offset, self.size, self.changed

    def read_bytes(self):
        """Return its bytes, fewer where the tar has become shorter."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Entry:
    """What a tar holds of one key.

    Args:
        pictures: list of TarMember.
        texts: {ending: its bytes}.
        name: of the first member, for errors.
    """

    def __init__(self, name):
        self.pictures, self.texts, self.name = [], {}, name


def names_tars(argument):
    """Tell whether an argument names tars, compressed ones too, or a folder that holds tars and no pictures."""
    if os.path.isdir(argument):
        with os.scandir(argument) as entries:
            endings = {os.path.splitext(e.name)[1].lower() for e in entries if not e.name.startswith(".")}
        return ".tar" in endings and not endings & IMAGE_SUFFIXES
    return any(name.lower().endswith(".tar") or COMPRESSED.search(name) for name in str(argument).split("::"))


def expand_tars(arguments):
    """Return the tars that arguments name, in order, each once.

    Args:
        arguments: each a tar, a folder of tars, a glob, or several joined by `::`; braces are ranges or lists.
    Raises: FileNotFoundError where one does not exist; ValueError for what is compressed, no tar, or badly written.
    """
    tars = []
    for name in (name for argument in arguments for name in str(argument).split("::")):
        if os.path.isdir(name):
            found = sorted(path for path in glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif os.path.exists(name):
            found = [name]
        else:
            found = list(itertools.chain.from_iterable(map(_expand_glob, _expand_braces(name, name))))
        if not found:
            raise FileNotFoundError(f"{name or repr(name)} names no tar, as the other inputs do; check the path")
        tars += found
    tars = list(dict.fromkeys(tars))
    for tar in tars:
        if COMPRESSED.search(tar):
            raise ValueError(f"{tar} is compressed, and pictures cannot be read where they lie: unpack it to a .tar")
        if not tar.lower().endswith(".tar"):
            raise ValueError(f"{tar} names no tar, as the other inputs do: give tars, or files and folders of pictures")
    missing = [tar for tar in tars if not os.path.isfile(tar)]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(tars):,} tars do not exist, {missing[0]} the first")
    return tars


def _expand_braces(name, whole):
    """Return the names that braces stand for, as bash and webdataset expand them; `whole` is for errors."""
    brace = BRACE.search(name)
    if not brace:
        if "{" in name or "}" in name:
            raise ValueError(f"{whole}: a brace without its other one; write {{00000..00999}} or {{a,b}}")
        return [name]
    span = RANGE.fullmatch(brace[1])
    if span:
        first, last = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if any(text != str(int(text)) for text in span.groups()) else 0
        if not 0 <= last - first < MOST_TARS:
            raise ValueError(f"{whole}: {{{brace[1]}}} names {max(0, last - first + 1):,} tars; write it upwards")
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in brace[1]:
        choices = brace[1].split(",")
    else:
        raise ValueError(f"{whole}: {{{brace[1]}}} is neither a range, {{00000..00999}}, nor a list, {{a,b}}")
    rests = _expand_braces(name[brace.end() :], whole)
    if len(choices) * len(rests) > MOST_TARS:
        raise ValueError(f"{whole} names {len(choices) * len(rests):,} tars, more than {MOST_TARS:,}")
    return [name[: brace.start()] + choice + rest for choice in choices for rest in rests]


def _expand_glob(name):
    """Return the files of a glob, or the name where it is none."""
    return sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not os.path.exists(name) else [name]


def read_tar(path):
    """Read a whole tar, except for the pictures' bytes.

    Args:
        path: of the tar.
    Returns: ({key: Entry}, {name: why it is left out}).
    Raises: FileNotFoundError where it has gone.
    """
    entries, faults = {}, {}
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        for member, error in _members(path):
            if error:
                faults[path] = error
            else:
                _take(member, file, status, path, entries, faults)
    for key, entry in list(entries.items()):
        if len(entry.pictures) > 1:
            faults[f"{path}/{key}"] = f"{len(entry.pictures)} pictures of one key: which is meant cannot be told"
        if len(entry.pictures) > 1 or None in entry.texts.values():
            del entries[key]
    if not faults and not any(entry.pictures for entry in entries.values()):
        faults[path] = "a tar without pictures"
    return entries, faults


def _take(member, file, status, path, entries, faults):
    """Add a member to the entry of its key, or to the faults.

    Args:
        member: tarfile.TarInfo.
        file: the open tar.
        status: of it.
        path, entries, faults: as in `read_tar`.
    """
    name = as_text(member.name.removeprefix("./"))
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if member.isdir() or name.split("/")[-1].startswith("."):  # macOS's `._photo.jpg` among them
        return
    if ending not in IMAGE_SUFFIXES and ending not in TEXTS:
        return
    error = _fault(member, name, status.st_size)
    if error:
        faults[f"{path}/{name[:100]}{'...' * (len(name) > 100)} (at byte {member.offset:,})"] = error
        return
    entry = entries.setdefault(stem, Entry(f"{path}/{name}"))
    if ending in IMAGE_SUFFIXES:
        entry.pictures.append(TarMember(path, name, member.offset_data, member.size, status.st_mtime_ns))
    elif ending in entry.texts:
        faults[f"{path}/{name} (at byte {member.offset:,})"] = f"a second {ending} of its key"
        entry.texts[ending] = None
    else:
        file.seek(member.offset_data)
        entry.texts[ending] = file.read(member.size)


def _members(path):
    """Yield (tarfile.TarInfo, None) of a tar's members, and at last (None, what is wrong) where something is."""
    seen = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                seen += 1
                yield member, None
                tar.members = []  # else tarfile keeps every member in memory
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if seen or "unexpected end" in str(error):
            yield None, f"truncated or damaged: it cannot be read behind {seen:,} members"
        else:
            yield None, "no tar" if os.path.getsize(path) else "an empty file"
        return
    # tarfile takes a header that it cannot read for the end, and looks no further
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(BLOCK)
        if len(mark) < BLOCK:
            yield None, "truncated: the tar has no end mark"
        elif mark.strip(b"\0"):
            yield None, f"damaged at byte {end:,}: the members behind are lost"
        elif any(piece.strip(b"\0") for piece in iter(lambda: file.read(1 << 16), b"")):
            yield (
                None,
                f"goes on behind its end mark, at byte {end:,}, as tars that were joined do: pack it anew",
            )


def _fault(member, name, size):
    """Say why a member is not taken, or None."""
    if name.startswith("/") or ".." in name.split("/"):
        return "a name that leads out of its folder"
    if len(name) > LONGEST_NAME:
        return f"a name of more than {LONGEST_NAME:,} characters"
    if not name.isprintable():
        return "a name with control characters"
    if not member.isreg() or member.issparse():
        return "a link or a device, not a file"
    if member.offset_data + member.size > size:
        return "truncated: the tar ends within it"
    text = os.path.splitext(name)[1].lower() in TEXTS
    if member.size > (LARGEST_TEXT if text else LARGEST_PICTURE):
        return f"{member.size:,} bytes are too many for {'a caption' if text else 'a picture'}"
    return None


def captions_of(entry):
    """Return the captions of an Entry, from its `.json` where that has several, else from its `.txt`.

    Raises: ValueError where there are none, or they cannot be read.
    """
    listed, error = None, None
    if ".json" in entry.texts:
        try:
            listed = _captions_in(json.loads(entry.texts[".json"].decode("utf-8-sig")))
        except (ValueError, RecursionError) as wrong:
            error = f"its .json cannot be read ({type(wrong).__name__})"
    if ".txt" in entry.texts and (listed is None or len(listed) < 2):
        try:
            return [entry.texts[".txt"].decode("utf-8-sig").strip()]
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8 text") from None
    if listed is None:
        raise ValueError(error or "no caption beside it in the tar")
    return listed


def _captions_in(value):
    """Return the captions that a `.json` holds, or None; raises ValueError where they are no texts."""
    if isinstance(value, dict):
        value = value.get("captions") or value.get("caption")
    if value is None:
        return None
    value = value if isinstance(value, list) else [value]
    if not value or not all(isinstance(caption, str) for caption in value):
        raise ValueError("captions that are no texts")
    return [caption.strip() for caption in value]
