"""What an extraction under way has encoded, so that the same command resumes after a kill."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from utils.cli import note

COLLECTED = 1024  # rows copied at a time


def partial_names(store_path):
    """Return the names of the PartialStores that processes have begun for a store: `x.pkl`, `x.pkl.rank1`, ..."""
    path = Path(store_path)
    pattern = re.compile(re.escape(path.name) + r"(\.rank\d+)?\.partial")
    folders = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    return [str(folder.with_suffix("")) for folder in folders if pattern.fullmatch(folder.name)]


def collect_rows(partials, keys):
    """Return the rows of images, whichever PartialStore each is in.

    Args:
        partials: list of PartialStore.
        keys: [N] keys of images.
    Returns: [N, D], or [N, K, D], float32.
    Raises: ValueError where an image is in none of them.
    """
    rows, missing = torch.empty(len(keys), *partials[0].shape), set(keys)
    for partial in partials:
        here = [number for number, key in enumerate(keys) if key in partial.rows]
        embeddings = partial.embeddings([keys[number] for number in here])
        for start in range(0, len(here), COLLECTED):
            rows[here[start : start + COLLECTED]] = embeddings[start : start + COLLECTED]
        missing -= partial.rows.keys()
    if missing:
        raise ValueError(f"{min(missing)[0]} changed while the images were encoded; run the same command again")
    return rows


class StoredRows:
    """Rows of a file of float32 numbers, in any order; slices are read on demand."""

    def __init__(self, path, rows, shape):
        """Name the rows.

        Args:
            path: file.
            rows: [N] numbers of rows.
            shape: of a row.
        """
        self.path, self.rows, self.shape = path, rows, (len(rows), *shape)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        """Return a slice's rows as a tensor [n, *shape of a row]."""
        rows = self.rows[part]
        if not rows:  # the file may be empty, and cannot be mapped then
            return torch.empty(0, *self.shape[1:])
        stored = np.memmap(self.path, np.float32, "r", shape=(max(rows) + 1, *self.shape[1:]))
        return torch.from_numpy(stored[rows])


class PartialStore:
    """Embeddings of an extraction under way, appended batch by batch so that a kill loses at most one batch.

    `<store>.partial/embeddings.f32` holds rows of D, or K·D, float32 numbers and `journal.jsonl` a line for every
    complete batch: the images' keys, and a checksum of keys and rows. Rows that the journal does not name, or that do
    not match its checksum, are encoded again.
    """

    def __init__(self, store_path, encoder):
        """Open or create the folder.

        Args:
            store_path: the store that is being made.
            encoder: its `identity()`, with `embed_dim` or, for tokens, `shape`; rows of another encoder are dropped.
        """
        self.folder = Path(f"{store_path}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape = tuple(encoder.get("shape") or [encoder["embed_dim"]])  # of a row
        self.row_bytes = math.prod(self.shape) * 4
        self.rows = {}  # image key -> row
        self._resume(encoder)

    @classmethod
    def encoded(cls, store_path, encoder):
        """Return the keys of the images that are encoded already, without creating a folder where there is none."""
        if not Path(f"{store_path}.partial").is_dir():
            return set()
        partial = cls(store_path, encoder)
        partial.close()
        return set(partial.rows)

    def _resume(self, encoder):
        """Read the journal, drop what a kill left unfinished, and open both files for appending."""
        journal = self.folder / "journal.jsonl"
        self.data = open(self.folder / "embeddings.f32", "ab+")  # noqa: SIM115
        self.data.seek(0)
        good_bytes = 0
        with open(journal, "ab+") as file:
            file.seek(0)
            for number, line in enumerate(file):
                entry = _parse_line(line)
                if entry is None or (number == 0 and entry != encoder):
                    break
                if number and not self._rows_agree(entry):
                    note(f"warning: {self.folder} is damaged after {len(self.rows):,} images; encoding the rest again")
                    break
                good_bytes += len(line)
            file.truncate(good_bytes)
        self.journal = open(journal, "ab")  # noqa: SIM115
        self.data.truncate(len(self.rows) * self.row_bytes)
        if not good_bytes:
            self._log(encoder)

    def _rows_agree(self, entry):
        """Check a journal line against the rows that follow, and add its images; returns whether they agree."""
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list):
            return False
        data = self.data.read(len(images) * self.row_bytes)
        if len(data) < len(images) * self.row_bytes or _checksum(images, data) != entry.get("crc32"):
            return False
        keys = [tuple(key) for key in images]
        if not self.rows.keys().isdisjoint(keys):
            return False
        self.rows.update({key: len(self.rows) + i for i, key in enumerate(keys)})
        return True

    def _log(self, entry):
        self.journal.write(json.dumps(entry).encode() + b"\n")
        self.journal.flush()

    def append(self, keys, embeddings):
        """Add a batch: the rows first, then the line that makes them count.

        Args:
            keys: per image, a tuple of text and numbers that changes when the file does.
            embeddings: [B, D], or [B, K, D], float32.
        """
        data = embeddings.numpy().tobytes()
        self.data.write(data)
        self.data.flush()
        self._log({"images": keys, "crc32": _checksum(keys, data)})
        self.rows.update({key: len(self.rows) + i for i, key in enumerate(keys)})

    def embeddings(self, keys):
        """Return the float32 rows of these images, as a StoredRows."""
        self.data.flush()
        return StoredRows(self.folder / "embeddings.f32", [self.rows[key] for key in keys], self.shape)

    def close(self):
        """Close the files; the folder stays for the next run."""
        self.journal.close()
        self.data.close()

    def remove(self):
        """Close and delete the folder, once the store is written."""
        self.close()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


def _checksum(keys, data):
    """Return a checksum that tells whether keys and rows are still those that were written together."""
    return zlib.crc32(data, zlib.crc32(json.dumps(keys).encode()))


def _parse_line(line):
    """Return what a journal's line holds, or None where it is incomplete."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
