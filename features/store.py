"""The feature store: CLIP embeddings and the captions that point into them.

On disk a pickle in the predecessors' format, `{"clip_embedding": [N, D], "captions": [{"image_id", "caption",
"clip_embedding": row, ...}]}`, or a folder of shards (features/shards.py), with a json beside it that says how it was
made. A store of tokens holds [N, K, D]. There is one row per image; the predecessors' files, with one row per caption,
can be read too. A store of pictures alone has no captions, and in the pickle `"images": [{"image_id", "file_name"}]`,
one per row. A store of texts, whose json says `"modality": "text"`, has one row per caption, from the text tower.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from encoders import known_encoder
from features.shards import MappedCaptions, read_shards
from features.store_files import check_there, foreign_shard, info_path
from utils.cli import in_words
from utils.files import atomic_path, read_json, reason, write_json

CHECKED = 1024  # rows checked at a time


@dataclass
class FeatureStore:
    """Embeddings with their captions.

    Args:
        clip_embedding: [N, D], or [N, K, D] of tokens, float tensor, or MappedEmbeddings.
        captions: list of records with `image_id`, `caption` and `clip_embedding`, the row of their image; or
            MappedCaptions; empty in a store of pictures alone.
        info: what the json beside the store says, or {}.
        path: where it was read from.
        images: in a pickle of pictures alone, the record of each row.
    """

    clip_embedding: torch.Tensor
    captions: list
    info: dict
    path: Path
    images: list | None = None

    @property
    def is_of_texts(self):
        """Whether the json says that rows are of texts, not of images."""
        return self.info.get("modality") == "text"

    @property
    def shape(self):
        """Shape of an image's embedding: (D,), or (K, D) of tokens."""
        return tuple(self.clip_embedding.shape[1:])

    @property
    def prefix_dim(self):
        """D, the width of the embeddings, or of their tokens."""
        return self.shape[-1]

    @property
    def num_tokens(self):
        """K, tokens per image; None where an image has one vector."""
        return self.shape[0] if len(self.shape) == 2 else None

    def index(self):
        """Return ([N captions] int64 row of each caption's image, [N] length of its text, stripped)."""
        if isinstance(self.captions, MappedCaptions):
            return self.captions.embedding_index, self.captions.lengths
        rows = np.fromiter((record["clip_embedding"] for record in self.captions), np.int64, len(self.captions))
        lengths = (len(record["caption"].strip()) for record in self.captions)
        return rows, np.fromiter(lengths, np.int64, len(self.captions))

    def fingerprint(self):
        """Return a hash of what a run is trained on, wherever the store lies: embeddings, captions, rows."""
        digest = hashlib.sha256(repr((tuple(self.clip_embedding.shape), len(self.captions))).encode())
        if isinstance(self.captions, MappedCaptions):
            self.clip_embedding.update(digest)
            self.captions.update(digest)
            return digest.hexdigest()
        digest.update(self.clip_embedding.detach().contiguous().view(torch.uint8).numpy())
        for record in self.captions:
            digest.update(f"{record['clip_embedding']} {record['caption']}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()


def check_captions(flag, store):
    """Refuse a store of pictures alone.

    Raises: ValueError naming the flag.
    """
    if not len(store.captions):
        raise ValueError(
            f"{flag} {store.path} holds pictures without captions, which train_scst.py --reward clip alone learns "
            f"from; for captions, extract it with parse_coco.py --annotations"
        )


def check_encoders(name, store, other, shape, described):
    """Refuse a store of another encoder than the one it must match.

    Args:
        name: of the FeatureStore `store`, with its flag. other: name of what it must match, such as --data's store.
        shape, described: of an image's embedding in `other`, and what is known of its encoder; see `known_encoder`.
    Raises: ValueError.
    """
    ours, theirs = known_encoder(store.info), known_encoder(described)
    if store.shape != shape or (ours and theirs and ours != theirs):
        what = "are of different encoders" if len(store.shape) == len(shape) else "do not both hold tokens"
        raise ValueError(
            f"{name} and {other} {what} ({ours or 'unknown'}: {in_words(store.shape)}; {theirs or 'unknown'}: "
            f"{in_words(shape)}); extract both with one, and the same --tokens"
        )


def write_store(path, clip_embedding, captions, info, images=None):
    """Write a pickle that the predecessors' train.py reads, and the json beside it; each atomically.

    An older json is deleted first, so that a kill leaves none that describes another pickle.

    Args:
        clip_embedding: [N, D], or [N, K, D], float32 tensor.
        captions: records whose `clip_embedding` is a row number.
        info: for the json.
        images: for pictures alone, the record of each row, with `image_id` and `file_name`.
    """
    value = {"clip_embedding": clip_embedding, "captions": captions} | ({} if images is None else {"images": images})
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            pickle.dump(value, file, protocol=4)
        info_path(path).unlink(missing_ok=True)
    write_json(info_path(path), info)


def read_store(path):
    """Read a feature store, ours or a predecessor's, running no code that the file may hold.

    Args:
        path: pickle, or folder of shards.
    Raises: FileNotFoundError; ValueError naming what is wrong and which caption.
    """
    check_there(path)
    path = Path(path)
    info = read_json(info_path(path)) if info_path(path).is_file() else {}
    info = info if isinstance(info, dict) else {}
    if path.is_dir():
        shards = read_shards(path, info.get("shards"))
        if not info and not foreign_shard(path):
            raise ValueError(
                f"{path}/ is not finished, or was moved without its json, {info_path(path)}: run the same "
                f"parse_coco.py again, finished shards stay; or put it there"
            )
        _check_shape(shards[0].shape, info, path)
        return FeatureStore(*shards, info, path)
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
    if embedding.ndim not in (2, 3) or 0 in embedding.shape[1:] or not embedding.is_floating_point():
        raise ValueError(
            f"{path}: clip_embedding is {list(embedding.shape)} {embedding.dtype}, not [N, D] or [N, K, D] of floats"
        )
    for start in range(0, len(embedding), CHECKED):
        finite = torch.isfinite(embedding[start : start + CHECKED]).flatten(1).all(1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"{path}: embedding row {row} holds NaN or infinity; extract it again")
    _check_shape(embedding.shape, info, path)
    alone = value["captions"] == [] and isinstance(value.get("images"), list)
    if not (alone and len(value["images"]) == len(embedding)):
        _check_captions(value["captions"], len(embedding), path)
    return FeatureStore(embedding, value["captions"], info, path, value.get("images"))


def _check_shape(shape, info, path):
    """Refuse embeddings that do not match the json beside them.

    Raises: ValueError.
    """
    stated, found = info.get("tokens", "pooled"), "pooled" if len(shape) == 2 else "patches"
    if info and stated != found:
        raise ValueError(
            f"{path} holds {in_words(shape[1:])}, and {info_path(path)} tells of tokens: {stated}: it is of another "
            f"store; extract it again"
        )


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
