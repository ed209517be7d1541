"""Finding images: the file that an annotation means, by its file name or, where it has none, by its id.

A name stands for one file only. It is looked for as a path below the folders, in their order, and beside the
annotations; else by its last parts, for a name may begin at a parent folder (`val2014/1.jpg` with the folder
`.../val2014`) or come from another machine. A match that would be a guess is refused.
"""

import collections
import contextlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from features.annotations import distinct_ids, image_id_of, normal_id
from features.listing import list_images
from utils.cli import note

MISSING = "no such image"
SHOWN = 3  # notes, at most, of folders that are taken for another name
ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:|[a-z]+://")  # an absolute path of any system, or a URL


@dataclass
class Match:
    """What a name leads to.

    Args:
        path: file, or None.
        reason: why there is none.
        folder: in which it lies.
        prefix: leading parts of the name, before those below `folder`, as `_plain` gives them.
        exact: whether every part of the name matches, letter by letter.
        whole: whether every part matches, in any letter case and Unicode form.
    """

    path: str | None = None
    reason: str | None = None
    folder: str = ""
    prefix: tuple = ()
    exact: bool = False
    whole: bool = False


class Names:
    """The names in a folder, read once."""

    def __init__(self, folder):
        self.names = {True: set(), False: set()}  # files, folders
        self.alike = None
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # a circular link is no file
                    is_file = entry.is_file()
                    if is_file or entry.is_dir():
                        self.names[is_file].add(entry.name)

    def named(self, name, is_file, exact):
        """Return the files or folders of a name; unless `exact`, in any letter case and Unicode form."""
        if exact or name in self.names[is_file]:
            return [name] if name in self.names[is_file] else []
        if self.alike is None:
            self.alike = {kind: collections.defaultdict(list) for kind in self.names}
            for kind, names in self.names.items():
                for own in sorted(names):
                    self.alike[kind][_plain(own)].append(own)
        return self.alike[is_file].get(_plain(name), [])


class ImageFinder:
    """Finds records' image files in several folders."""

    def __init__(self, folders, annotations=None):
        """List the folders once.

        Args:
            folders: searched in this order.
            annotations: file beside which relative names are searched too.
        Raises: FileNotFoundError where none of the folders exists; ValueError for a file; OSError where one cannot be
            read.
        """
        for folder in folders:
            if Path(folder).is_file():
                raise ValueError(f"image folder {folder} is a file; pass its folder")
        there = [str(folder) for folder in folders if Path(folder).is_dir()]
        if not there:
            raise FileNotFoundError(
                f"no image folder: {', '.join(map(str, folders))} do not exist; pass --images FOLDER"
            )
        self.folders = list({os.path.realpath(folder): folder for folder in reversed(there)}.values())[::-1]
        self.beside = [str(Path(annotations).parent)] if annotations else []
        self._listings = {folder: Names(folder) for folder in self.folders}
        self._trails = {folder: _parts(_plain(os.path.realpath(folder))) for folder in self.folders}
        self._numbers = None

    def find(self, record):
        """Return the record's image file, or None where there is none, or no single one."""
        return self.find_all([record])[0][0]

    def find_all(self, records):
        """Find the images of one file's records; their names are judged together.

        Returns: list of (image file, None) or (None, why there is none).
        """
        names = dict.fromkeys(record["file_name"] for record in records if record.get("file_name"))
        matches = {name: self._find_name(name) for name in names}
        self._refuse_guesses(matches)
        ids = distinct_ids(record["image_id"] for record in records if not record.get("file_name"))
        numbered = {text: self._find_id(text) for text in ids}
        meant = collections.defaultdict(list)
        for text, match in numbered.items():
            meant[match.path].append(text)
        for text, match in numbered.items():
            if match.path and len(meant[match.path]) > 1:
                numbered[text] = Match(reason=f"image_id {' and '.join(meant[match.path])} would all be {match.path}")
        named, numbered = (
            {key: (m.path and Path(m.path), m.reason) for key, m in found.items()} for found in (matches, numbered)
        )
        return [
            named[record["file_name"]] if record.get("file_name") else numbered[str(record["image_id"]).strip()]
            for record in records
        ]

    def _find_id(self, image_id):
        """Return the Match of an id: a number, a name without ending, or, if no image has that id, a whole name."""
        if self._numbers is None:
            self._numbers = collections.defaultdict(list)
            for folder in self.folders:
                for path in list_images(folder):
                    self._numbers[image_id_of(path)].append(str(path))
        paths = _different(self._numbers.get(normal_id(image_id), []))
        if len(paths) > 1:
            return Match(reason=f"image_id {image_id} is that of both {paths[0]} and {paths[1]}")
        if paths:
            return Match(path=paths[0], whole=True)
        named = self._find_name(image_id) if "." in image_id else Match()
        return named if named.whole else Match(reason=MISSING)

    def _find_name(self, name):
        """Return the Match of a file name."""
        if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
            path = self._find_outright(name)
            if path:
                return Match(path=path, exact=True, whole=True)
        parts = _parts(name)
        if not parts or ".." in parts:
            return Match(reason=MISSING)
        for folder in (*self.folders, *self.beside):
            for own in ((name,), parts) if "\\" in name and "/" not in name else (parts,):
                paths = self._below(folder, own, exact=True)
                if paths:
                    return Match(path=paths[0], folder=folder, exact=True, whole=True)
        if not ABSOLUTE.match(name) and len(parts) == 1 and "." not in name:
            return self._find_id(name)  # a column `image` may hold numbers, or names without ending
        match = self._find_end(parts)
        if not match.path and any(os.path.islink(os.path.join(folder, name)) for folder in self.folders):
            match.reason = "a link that leads nowhere"
        return match

    def _find_outright(self, name):
        """Return the file of an absolute name, or of one with `..` that stays in the folders; or None."""
        for folder in (*self.folders, *self.beside):
            path = os.path.normpath(os.path.join(folder, name))
            inside = any(_is_below(path, root) for root in (*self.folders, *self.beside))
            if (os.path.isabs(name) or inside) and os.path.isfile(path):
                return path
        return None

    def _find_end(self, parts):
        """Return the Match of a name by as many last parts as possible; those of the folder's own path count too."""
        best, found, plain = (0, False), [], tuple(map(_plain, parts))
        for folder in (*self.folders, *self.beside):
            trail = self._trails.get(folder)
            # nothing but the whole name is looked for beside the annotations
            for start in range(len(parts) if trail is not None else 1):
                paths = self._below(folder, parts[start:], exact=True)
                rank = len(parts) - start + _common_end(trail or (), plain[:start]), bool(paths)
                for path in paths or self._below(folder, parts[start:], exact=False):
                    if rank > best:
                        best, found = rank, []
                    if rank == best:
                        whole = rank[0] == len(parts)
                        found.append(Match(path, None, folder, plain[:start], whole and rank[1], whole))
        if not found:
            return Match(reason=MISSING)
        others = _different([match.path for match in found])
        if len(others) > 1 and not found[0].exact:  # of several exact matches, the first folder's counts
            return Match(reason=f"may be {others[0]} or {others[1]}: write the name as it is on the disk")
        if not found[0].whole and self._is_elsewhere(found[0], plain[-best[0] - 1 : -1]):
            return Match(reason=MISSING)
        return found[0]

    def _below(self, folder, parts, exact):
        """Return the files that lie `parts` below a folder."""
        here = [folder]
        for number, part in enumerate(parts, 1):
            is_file = number == len(parts)
            here = [path for folder in here for path in self._named(folder, part, is_file, exact)]
        return here

    def _named(self, folder, name, is_file, exact):
        """Return the files or folders of a name in a folder, none where it cannot be read; see `Names.named`."""
        if folder not in self._listings:
            self._listings[folder] = None
            with contextlib.suppress(OSError):
                self._listings[folder] = Names(folder)
        listing = self._listings[folder]
        return [os.path.join(folder, own) for own in listing.named(name, is_file, exact)] if listing else []

    def _is_elsewhere(self, match, named):
        """Tell whether the folder in a name exists here, so that it cannot mean the match's folder.

        Args:
            named: the name's last folders, one more than the match agrees with.
        """
        trail = self._trails[match.folder]
        if _common_end(trail, match.prefix) == len(trail):  # the name has the folder's whole path
            return False
        above = Path(os.path.realpath(match.folder)).parents[_common_end(trail, match.prefix)]
        if any(trail[-len(named) :] == named for trail in self._trails.values()):
            return True
        for folder in (*self.folders, str(above)):
            here = [folder]
            for name in named:
                here = [path for below in here for path in self._named(below, name, is_file=False, exact=False)]
            if here:
                return True
        return False

    def _refuse_guesses(self, matches):
        """Replace matches by reasons where all names together show that they would be guesses.

        Where whole matches show which `prefix` stands for a folder, the folder's other matches must have the same one;
        and two names must not mean one file, unless both match whole and exactly.
        """
        meant, taken = collections.defaultdict(set), {}
        for name, match in matches.items():
            if match.path:
                meant[match.path].add(unicodedata.normalize("NFC", "/".join(_parts(name))))
        unsure = [
            name for name, m in matches.items() if m.path and not (m.whole and (m.exact or len(meant[m.path]) == 1))
        ]
        ways = self._ways(matches) if unsure else {}
        for name in unsure:
            match = matches[name]
            known = ways[match.folder]
            agrees = match.prefix in known
            if ABSOLUTE.match(name):  # from another machine, whose own folders come first
                agrees = any(_common_end(match.prefix, way) == len(way) for way in known)
            if not match.whole and known and not agrees:
                matches[name] = Match(reason=MISSING)
            elif len(meant[match.path]) > 1:
                first, second = sorted(meant[match.path])[:2]
                matches[name] = Match(reason=f"{first} and {second} would both be {match.path}")
            elif not match.whole:
                taken.setdefault((match.prefix, match.folder), name)
        for (prefix, folder), name in list(taken.items())[:SHOWN]:
            note(f"warning: what is named {'/'.join(prefix)}/..., such as {name}, is taken from {folder}")

    def _ways(self, matches):
        """Return {folder: the leading parts, before those below it, of each whole name of a file in it}."""
        ways = collections.defaultdict(set)
        roots = {folder: len(_parts(os.path.abspath(folder))) for folder in self.folders}
        for name, match in matches.items():
            if match.whole:
                parts, path = _parts(_plain(name)), os.path.abspath(match.path)
                below = len(_parts(path))
                for folder, depth in roots.items():
                    if below - depth <= len(parts) and _is_below(path, folder):
                        ways[folder].add(parts[: len(parts) - (below - depth)])
        return ways


def match_images(records, finder):
    """Find records' images; two images must not share an id.

    Returns: list of (image file, None), or (image file or None, why the record cannot be used), one per record.
    """
    owners, results = {}, []
    ids = distinct_ids(record["image_id"] for record in records)
    for record, (path, reason) in zip(records, finder.find_all(records), strict=True):
        image_id = ids[str(record["image_id"]).strip()]
        owner = path and owners.setdefault(image_id, path)
        if owner is not path and owner != path:
            reason = f"image_id {image_id} is that of {owners[image_id]} too"
        results.append((path, reason))
    return results


def _plain(name):
    """Return a name in one letter case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _parts(name):
    """Return a path's parts as a tuple, separated by slashes or backslashes."""
    return tuple(part for part in re.split(r"[/\\]", name) if part not in ("", "."))


def _common_end(first, second):
    """Return how many of the last parts of two paths are the same."""
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return count


def _is_below(path, folder):
    """Tell whether a path lies in a folder, by name alone."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) == folder


def _different(paths):
    """Return files without duplicates; a link counts as the file it leads to."""
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
