"""Where pictures come from: one interface for folders, tars, texts and what is being downloaded.

A source is a row of parts. A part becomes one shard of a store, or one file of captions; what is in it is read when it
is its turn, so that memory is the same whatever the number of parts. In it stand pictures with their records: a picture
is a path, or what stands for one (`features.texts.Sentence`), and is told from another one by its fingerprint; records
hold `caption`, where there are captions, and `image_id`.
"""

import os

from features.images import is_readable
from features.shards import shard_rows
from features.texts import Sentence
from utils.distributed import share


def fingerprint(picture):
    """Return what tells whether a picture is still the one that was encoded: of a file, its name, bytes, time in ns.

    A Sentence is that itself.
    """
    if isinstance(picture, Sentence):
        return picture
    status = os.stat(picture)
    return str(picture), status.st_size, status.st_mtime_ns


class Source:
    """A row of parts. What is no more than that says `parts`; the rest follows.

    Args:
        skipped: {name: why it is left out} of what belongs to no part.
        count: how many pictures there are, where that is known before they are read.
    """

    skipped, count = {}, None

    def parts(self):
        """Return the parts, in order: one per shard."""
        raise NotImplementedError

    def made_of(self):
        """Return plain data that changes when the source does, without reading the pictures."""
        return [part.made_of() for part in self.parts()]

    def shares(self, _encoded):
        """Return the parts that this process encodes into a pickle, of which all processes together make all.

        Args:
            encoded: fingerprints of pictures that need no more work, so that what is left can be shared out evenly.
        """
        return share(self.parts())

    def read(self):
        """Return all pictures and what is left out, as `Part.read` does; for what is held in memory anyway."""
        pictures, skipped = {}, {}
        for part in self.parts():
            own, left_out = part.read()
            pictures |= own
            skipped |= left_out
        return pictures, skipped


class Part:
    """Some of a source's pictures; these are in memory already.

    Args:
        pictures: {picture: [its records]}.
        count: how many, where that is known before they are read.
    """

    def __init__(self, pictures):
        self.pictures, self.count = pictures, len(pictures)

    def made_of(self):
        """Return plain data that changes when the part does, its captions too."""
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
            _reader: as `features.images.reader` returned then; None where that was not kept.
        """
        return any(map(is_readable, skipped))


class FoundPictures(Source):
    """Pictures or Sentences that are all in memory, such as those of annotations and folders."""

    def __init__(self, pictures, skipped):
        """Take what has been found.

        Args:
            pictures: {picture: [its records]}.
            skipped: {name: why it is left out}.
        """
        self.pictures, self.skipped, self.count = pictures, skipped, len(pictures)

    def parts(self):
        """Return parts of `shard_rows` pictures."""
        paths, rows = list(self.pictures), shard_rows(len(self.pictures))
        return [
            Part({path: self.pictures[path] for path in paths[start : start + rows]})
            for start in range(0, len(paths), rows)
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
