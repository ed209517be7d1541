"""Where pictures come from: one interface for folders, tars, texts and downloads.

A source is a sequence of parts. A part becomes one shard of a store, or one file of captions; it is read only when its
turn comes, so that memory does not grow with the number of parts. It holds pictures with their records: a picture is a
path, or stands in for one (a Sentence, a TarMember), and is identified by its fingerprint; records hold `caption`,
where there are captions, and `image_id`.
"""

import os
from pathlib import Path

from features.annotations import image_id_of
from features.images import is_readable, reader
from features.results import name_pictures
from features.store_files import shard_rows
from features.tars import TarMember, captions_of, read_tar
from features.texts import Sentence
from utils.processes import share


def fingerprint(picture):
    """Return what tells whether a picture is still the one that was encoded: for a file, name, size and mtime in ns.

    A Sentence is its own fingerprint; a TarMember's holds its place in the tar and the tar's mtime.
    """
    if isinstance(picture, Sentence):
        return picture
    if isinstance(picture, TarMember):
        return picture.fingerprint()
    status = os.stat(picture)
    return str(picture), status.st_size, status.st_mtime_ns


class Source:
    """A sequence of parts. A subclass must define `parts`; the other methods follow from it.

    Attributes:
        skipped: {name: why it is left out} of what belongs to no part.
        count: how many pictures there are, where that is known before they are read.
        records: how many records of annotations the parts should hold; None: there are no separate annotations.
    """

    skipped, count, records = {}, None, None

    def parts(self):
        """Return the parts, in order: one per shard."""
        raise NotImplementedError

    def made_of(self):
        """Return plain data that changes when the source does, without reading the pictures."""
        return [part.made_of() for part in self.parts()]

    def shares(self, _encoded):
        """Return the parts that this process encodes into a pickle; all processes together cover the source.

        Args:
            encoded: fingerprints of pictures that are encoded already, so that the rest can be shared out evenly.
        """
        return share(self.parts())

    def has_readable(self, skipped):
        """Tell whether the pictures in `skipped` ({name: reason} of an earlier run's pickle) are worth another try."""
        return bool(skipped)

    def read(self):
        """Return all pictures and what is left out, as `Part.read` does; for use where all fit in memory."""
        pictures, skipped = {}, {}
        for part in self.parts():
            own, left_out = part.read()
            pictures |= own
            skipped |= left_out
        return pictures, skipped


class Part:
    """Some of a source's pictures, in memory already.

    Args:
        pictures: {picture: [its records]}.
        name: of the files that are made from it, different in every part.
        of: what it belongs to, for messages: a tar, or what the command line named.

    Attributes:
        count: how many pictures, where that is known before they are read.
    """

    def __init__(self, pictures, name="", of=""):
        self.pictures, self.name, self.of, self.count = pictures, name, of, len(pictures)

    def made_of(self):
        """Return plain data that changes when the part or its captions do."""
        return [
            (*fingerprint(picture), *(record.get("caption") for record in records))
            for picture, records in self.pictures.items()
        ]

    def read(self):
        """Return ({picture: [its records]}, {name: why it is left out})."""
        return self.pictures, {}

    def has_readable(self, skipped, _reader):
        """Tell whether one of the pictures that an earlier run could not read can be read now.

        Args:
            skipped: {name: why it was left out}.
            _reader: what `features.images.reader` returned then; None where it was not recorded.
        """
        return any(map(is_readable, skipped))


class FoundPictures(Source):
    """Pictures or Sentences that are all in memory, such as those of annotations and folders."""

    def __init__(self, pictures, skipped, of=""):
        """Take what has been found.

        Args:
            pictures: {picture: [its records]}.
            skipped: {name: why it is left out}.
            of: what the command line named.
        """
        self.pictures, self.skipped, self.of, self.count = pictures, skipped, of, len(pictures)

    def parts(self):
        """Return parts of `shard_rows` pictures."""
        paths, rows = list(self.pictures), shard_rows(len(self.pictures))
        return [
            Part({path: self.pictures[path] for path in paths[start : start + rows]}, f"captions_{number:04d}", self.of)
            for number, start in enumerate(range(0, len(paths), rows))
        ]

    def made_of(self):
        """See Source; the same as one part of all pictures."""
        return Part(self.pictures).made_of()

    def shares(self, encoded):
        """See Source; picture by picture."""
        todo = [picture for picture in self.pictures if fingerprint(picture) not in encoded]
        return [Part({picture: self.pictures[picture] for picture in share(todo)})]

    def read(self):
        """See Source."""
        return self.pictures, {}


class TarPart(Part):
    """The pictures of one tar, which is read when its turn comes.

    Args:
        path: of the tar.
        name: that tells it from the source's other tars.
        captions: KeyedCaptions; None: those in the tar; False: pictures alone.
        unique: start of the keys that no other tar of the source has; None: there is no such start.
    """

    count = None

    def __init__(self, path, name, captions, unique):
        self.path, self.name, self.of, self.captions, self.unique = path, name, path, captions, unique

    def made_of(self):
        """See Part."""
        status = os.stat(self.path)
        kind = self.captions.made_of if self.captions else self.captions
        return [self.path, status.st_size, status.st_mtime_ns, self.name, kind]

    def read(self):
        """See Part."""
        entries, skipped = read_tar(self.path)
        taken = {entry.pictures[0]: (key, entry) for key, entry in entries.items() if entry.pictures}
        named, pictures = name_pictures(list(taken)), {}
        for picture, (key, entry) in taken.items():
            [record] = named[picture]
            if self.unique is None or not key.split("/")[-1].startswith(self.unique):
                record["image_id"] = f"{self.name}/{key}"
            if self.captions is False:
                pictures[picture] = [record]
                continue
            try:
                records = self.captions.of(key) if self.captions else [{"caption": c} for c in captions_of(entry)]
            except ValueError as error:
                skipped[str(picture)] = str(error)
                continue
            if records:
                pictures[picture] = [record | own for own in records]
        for entry in entries.values():
            if not entry.pictures and not self.captions:
                skipped[entry.name] = "no picture of this key in the tar"
        return pictures, skipped

    def has_readable(self, skipped, then):
        """See Part; checked only where the decoders have changed, or a fault may have been the disk's."""
        if then == reader() and not any(reason.startswith("cannot be opened") for reason in skipped.values()):
            return False
        pictures, _ = self.read()
        return any(is_readable(picture) for picture in pictures if str(picture) in skipped)


class Tars(Source):
    """Tars of img2dataset's or webdataset's kind, each a part."""

    def __init__(self, paths, captions=None):
        """Take tars.

        Args:
            paths: of the tars.
            captions: KeyedCaptions; None: those in the tars; False: pictures alone.
        """
        self.paths, self.captions = paths, captions
        self.records = captions.count if captions else None

    def parts(self):
        """See Source."""
        names, parts = part_names(self.paths), []
        # img2dataset's keys begin with their tar's number, all of one width; other tars may repeat keys
        apart = names == [Path(path).stem for path in self.paths] and len(set(map(len, names))) == 1
        for path, name in zip(self.paths, names, strict=True):
            unique = "" if len(names) == 1 else name if apart else None
            parts.append(TarPart(path, name, self.captions, unique))
        return parts


def part_names(paths):
    """Return a name for each file: its stem, or, where stems repeat, its path below the files' common folder."""
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) == len(paths):
        return stems
    absolute = [os.path.abspath(path) for path in paths]
    above = os.path.commonpath(map(os.path.dirname, absolute))
    return [os.path.splitext(os.path.relpath(path, above))[0] for path in absolute]


class KeyedCaptions:
    """Captions of annotations, by the key of a picture in a tar: a file's name without ending, or its id."""

    def __init__(self, records, made_of):
        """Take records.

        Args:
            records: of annotations.
            made_of: plain data that changes when they do.
        """
        self.made_of, self.count, self.named, self.numbered = made_of, len(records), {}, {}
        for record in records:
            if record.get("file_name"):
                stem = os.path.splitext(record["file_name"].replace("\\", "/").split("/")[-1])[0]
                self.named.setdefault(stem, []).append(record)
            else:
                self.numbered.setdefault(record["image_id"], []).append(record)

    def of(self, key):
        """Return the records of a key; folders in the key do not count."""
        name = key.split("/")[-1]
        return self.named.get(name) or self.numbered.get(image_id_of(f"{name}.jpg")) or []
