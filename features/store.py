"""The feature store: CLIP embeddings and the captions that point into them.

On disk a pickle in the predecessors' format, `{"clip_embedding": [N, D], "captions": [{"image_id", "caption",
"clip_embedding": row, ...}]}`, or a folder of shards (features/shards.py), with a json beside it that says how it was
made. Rows are one per image; the predecessors' files, one row per caption, are read as they are.
"""

import io
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from features.shards import MappedCaptions, read_shards
from utils.files import atomic_path, read_json, reason, write_json


@dataclass
class FeatureStore:
    """Embeddings with their captions.

    Args:
        clip_embedding: [N, D] float tensor, or MappedEmbeddings.
        captions: list of records with `image_id`, `caption` and `clip_embedding`, the row of their image; or
            MappedCaptions.
        info: what the json beside the store says, or {}.
        path: where it was read from.
    """

    clip_embedding: torch.Tensor
    captions: list
    info: dict
    path: Path

    @property
    def prefix_dim(self):
        """D, the width of the embeddings."""
        return self.clip_embedding.shape[1]

    def index(self):
        """Return ([N captions] int64 row of each caption's image, [N] length of its text without blanks around)."""
        if isinstance(self.captions, MappedCaptions):
            return self.captions.embedding_index, self.captions.lengths
        rows = np.fromiter((record["clip_embedding"] for record in self.captions), np.int64, len(self.captions))
        lengths = (len(record["caption"].strip()) for record in self.captions)
        return rows, np.fromiter(lengths, np.int64, len(self.captions))


def info_path(path):
    """Return the json beside a store: `x.pkl` -> `x.json`, `x/` -> `x.json`."""
    path = Path(path)
    return path.with_name(path.name + ".json") if path.is_dir() else path.with_suffix(".json")


def write_store(path, clip_embedding, captions, info):
    """Write a pickle that the predecessors' train.py reads, and the json beside it; each atomically.

    Args:
        clip_embedding: [N, D] float32 tensor.
        captions: records whose `clip_embedding` is a row number.
        info: for the json.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump({"clip_embedding": clip_embedding, "captions": captions}, file, protocol=4)
    write_json(info_path(path), info)


def read_store(path):
    """Read a feature store, ours or a predecessor's, running no code that the file may hold.

    Args:
        path: pickle, or folder of shards.
    Raises: FileNotFoundError; ValueError naming what is wrong and which caption.
    """
    path = Path(path)
    info = read_json(info_path(path)) if info_path(path).is_file() else {}
    info = info if isinstance(info, dict) else {}
    if path.is_dir():
        return FeatureStore(*read_shards(path, info.get("shards")), info, path)
    if not path.is_file():
        raise FileNotFoundError(f"feature store {path} does not exist; make it with parse_coco.py, or check --data")
    with open(path, "rb") as file:
        try:
            value = SafeUnpickler(file).load()
        except UnsafePickle as error:
            raise ValueError(
                f"{path} {error}; it was not loaded. A feature store holds tensors and text only"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is damaged or no pickle ({reason(error)})") from None
    if not isinstance(value, dict) or not {"clip_embedding", "captions"} <= set(value):
        raise ValueError(f"{path} is no feature store: it must hold 'clip_embedding' and 'captions'")
    embedding = torch.as_tensor(value["clip_embedding"])
    if embedding.ndim != 2 or not embedding.is_floating_point():
        raise ValueError(f"{path}: clip_embedding is {list(embedding.shape)} {embedding.dtype}, not [N, D] of floats")
    if not torch.isfinite(embedding).all():
        row = int((~torch.isfinite(embedding)).any(1).nonzero()[0])
        raise ValueError(f"{path}: embedding row {row} holds NaN or infinity; extract it again")
    _check_captions(value["captions"], len(embedding), path)
    return FeatureStore(embedding, value["captions"], info, path)


def _check_captions(captions, rows, path):
    """Refuse captions that point nowhere.

    Raises: ValueError naming the first bad record, counted from 1.
    """
    if not isinstance(captions, list) or not captions:
        raise ValueError(f"{path} holds no captions")
    for number, record in enumerate(captions, 1):
        if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
            raise ValueError(f"{path}, caption {number} has no text: {str(record)[:80]}")
        row = record.get("clip_embedding")
        if not isinstance(row, int) or not 0 <= row < rows:
            raise ValueError(f"{path}, caption {number} points at embedding {row!r}; there are rows 0 to {rows - 1}")


class UnsafePickle(pickle.UnpicklingError):
    """A pickle that asks for something which is neither a tensor nor plain data."""


def _load_storage(data):
    """Rebuild a tensor's storage from its bytes, without the unrestricted load that torch's own function does."""
    return torch.load(io.BytesIO(data), weights_only=True)


class SafeUnpickler(pickle.Unpickler):
    """Unpickles plain data, torch tensors and numpy arrays; refuses every other name."""

    ALLOWED = {
        ("collections", "OrderedDict"): dict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _load_storage,
        ("torch", "Size"): torch.Size,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    NUMPY = {"_reconstruct", "scalar", "_frombuffer"}

    def find_class(self, module, name):
        """Return an allowed name's object.

        Raises: UnsafePickle for all others.
        """
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric") and name in self.NUMPY:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how old protocols store bytes
            return super().find_class(module, name)
        raise UnsafePickle(f"asks for {module}.{name}, which could run code")


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
    Returns: [N, D] float32.
    Raises: ValueError where one is in none.
    """
    rows, missing = torch.empty(len(keys), partials[0].dim), set(keys)
    for partial in partials:
        here = [number for number, key in enumerate(keys) if key in partial.rows]
        rows[here] = partial.embeddings([keys[number] for number in here])
        missing -= partial.rows.keys()
    if missing:
        raise ValueError(f"{min(missing)[0]} changed while the images were encoded; run the same command again")
    return rows


class PartialStore:
    """Embeddings of an extraction under way, appended batch by batch so that a kill loses at most one batch.

    `<store>.partial/embeddings.f32` holds rows of D float32 numbers and `journal.jsonl` a line for every batch that is
    wholly in it: the images' keys. A row that the journal does not name was not finished and is cut off.
    """

    def __init__(self, store_path, encoder):
        """Open or begin the folder.

        Args:
            store_path: the store that is being made.
            encoder: name, sha256 and embed_dim of the encoder, as a dict; another encoder's rows are thrown away.
        """
        self.folder = Path(f"{store_path}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dim = encoder["embed_dim"]
        self.rows = {}  # image key -> row
        self._resume(encoder)

    @classmethod
    def encoded(cls, store_path, encoder):
        """Return the keys of the images that are encoded already, without beginning a folder where there is none."""
        if not Path(f"{store_path}.partial").is_dir():
            return set()
        partial = cls(store_path, encoder)
        partial.close()
        return set(partial.rows)

    def _resume(self, encoder):
        """Read the journal, drop what a kill left unfinished, and open both files for appending."""
        journal, data = self.folder / "journal.jsonl", self.folder / "embeddings.f32"
        good_bytes = 0
        with open(journal, "ab+") as file:
            file.seek(0)
            for number, line in enumerate(file):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None or (number == 0 and entry != encoder):
                    break
                if number:
                    enough = data.is_file() and data.stat().st_size >= (len(self.rows) + len(entry)) * self.dim * 4
                    if not enough:
                        break
                    self.rows.update({tuple(key): len(self.rows) + i for i, key in enumerate(entry)})
                good_bytes += len(line)
            file.truncate(good_bytes)
        self.journal, self.data = open(journal, "ab"), open(data, "ab+")  # noqa: SIM115
        self.data.truncate(len(self.rows) * self.dim * 4)
        if not good_bytes:
            self._log(encoder)

    def _log(self, entry):
        self.journal.write(json.dumps(entry).encode() + b"\n")
        self.journal.flush()

    def append(self, keys, embeddings):
        """Add a batch: the rows first, then the line that makes them count.

        Args:
            keys: per image, a tuple of text and numbers that changes when the file does.
            embeddings: [B, D] float32.
        """
        self.data.write(embeddings.numpy().tobytes())
        self.data.flush()
        self._log([list(key) for key in keys])
        self.rows.update({key: len(self.rows) + i for i, key in enumerate(keys)})

    def embeddings(self, keys):
        """Return the [N, D] float32 rows of these images."""
        if not keys:
            return torch.empty(0, self.dim)
        self.data.flush()
        stored = np.memmap(self.folder / "embeddings.f32", np.float32, "r", shape=(len(self.rows), self.dim))
        return torch.from_numpy(stored[[self.rows[key] for key in keys]])

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
