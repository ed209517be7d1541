"""The pictures of a folder, and what else it holds."""

import glob
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from features.kinds import HEAD, is_picture
from utils.cli import note

# files with these endings count as pictures, and are reported where they are none; others are judged by content
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif .heic .heif".split()
)
NAMED = 3  # files in a message
# what would end a line or a column of `path<TAB>caption`
ESCAPED = {ord(letter): repr(letter)[1:-1] for letter in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


@dataclass
class Listing:
    """What there is under a folder or a glob; hidden files, macOS's `._photo.jpg` among them, do not count.

    Args:
        images: picture files, sorted.
        others: names of the files that are no pictures.
        folders: how many there are.
    """

    images: list
    others: list
    folders: int

    def left_out(self):
        """Say in a few words what is left out, or ''."""
        parts = []
        if self.others:
            names = ", ".join(map(as_line, self.others[:NAMED])) + ", ..." * (len(self.others) > NAMED)
            parts.append(f"{len(self.others):,} file{'s' * (len(self.others) > 1)} of other kinds ({names})")
        if self.folders:
            parts.append(f"{self.folders:,} folder{'s' * (self.folders > 1)}")
        return " and ".join(parts)


def list_folder(folder):
    """Return the Listing of a folder.

    Raises: FileNotFoundError where it does not exist; ValueError for a file.
    """
    if os.path.isfile(folder):
        raise ValueError(f"image folder {folder} is a file; pass its folder")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"image folder {folder} does not exist")
    with os.scandir(folder) as entries:
        return sort_out(entries)


def list_images(folder):
    """Return the image files of a folder, sorted by name; raises as `list_folder`."""
    return list_folder(folder).images


def sort_out(entries):
    """Return the Listing of directory entries or paths.

    A name with a picture's ending counts as one, even a link to nothing, which is reported when it is read.
    """
    listing = Listing([], [], 0)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            listing.folders += 1
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES or _holds_picture(entry):
            listing.images.append(Path(entry))
        else:
            listing.others.append(entry.name)
    listing.images.sort()
    listing.others.sort()
    return listing


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _holds_picture(path):
    """Tell by its first bytes whether a file is a picture; what cannot be opened is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            return False
        with open(path, "rb") as file:
            return is_picture(file.read(HEAD))
    except OSError:
        return False


def find_images(arguments):
    """Expand files, folders and globs into image files, in order, each once; what is left out is counted in a line.

    Raises: FileNotFoundError naming the argument that is none of these; ValueError for a folder or glob without
        images.
    """
    paths = []
    for argument in arguments:
        if os.path.isdir(argument):
            paths += images_in(list_folder(argument), f"folder {argument}", os.path.join(argument, "**", "*.jpg"))
        elif os.path.lexists(argument):
            paths.append(Path(argument))
        else:
            matches = [Path(match) for match in glob.glob(argument, recursive=True)]
            if not matches:
                raise FileNotFoundError(f"{argument or repr(argument)} is no image file, folder or glob that matches")
            paths += images_in(sort_out(matches), argument)
    return list(dict.fromkeys(paths))


def images_in(listing, where, below=None):
    """Return the images of a Listing, and note what is left out.

    Args:
        where: the folder or glob, as it was named.
        below: glob that reaches into subfolders, for the hint; None for a glob, whose folders do not count.
    Raises: ValueError where there are none.
    """
    if below is None:
        listing.folders = 0
    left_out = listing.left_out()
    hint = f'; for what the folders hold, quote a glob: "{below}"' if listing.folders else ""
    if not listing.images:
        raise ValueError(f"{where} holds no images{f', but {left_out}' if left_out else ''}{hint}")
    if left_out:
        note(f"left out of {where}: {left_out}{hint}")
    return listing.images


def as_text(path):
    """Return a file's name as text that can be written: bytes of it that are not UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def as_line(path):
    """Return a file's name as text without line breaks or tabs, which are written `\\n`, `\\t`."""
    return as_text(path).translate(ESCAPED)
