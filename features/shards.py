"""The feature store as a folder of shards, for what does not fit in memory: clip-retrieval's layout.

    img_emb/img_emb_0000.npy         float16 [n, D], or [n, K, D] of tokens, memory-mapped
    metadata/metadata_0000.parquet   n rows: image_path, caption, image_id; captions, where an image has several;
                                     no caption, where the pictures have none; no image_path, where rows are of texts

Row i of a parquet describes row i of the npy beside it. Folders written by clip-retrieval can be read; the
embedding-reader package can read ours.
"""

import bisect
import hashlib
import json
import math
import mmap
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from features.images import reader
from features.listing import as_text
from features.store_files import STAMP
from features.texts import Sentence
from utils.cli import in_words
from utils.distributed import all_union
from utils.files import atomic_path, reason
from utils.processes import share

# bytes that are mapped before their pages are released; one page fault may map FAULT bytes around a row
MAPPED, FAULT = 1 << 27, 1 << 20
LOOKED_AT = 1 << 17  # numbers checked at a time, which fit the CPU cache
WRITTEN = 256  # rows converted and written at a time
# bytes of embeddings that a fingerprint reads, in a second or two; of larger stores, in pieces spread over all shards:
# all 100 GB of 100 million images would take minutes at every start
FINGERPRINTED, PIECE = 1 << 30, 1 << 20


def shard_files(folder, number):
    """Return a shard's two files, (npy, parquet)."""
    folder = Path(folder)
    return folder / "img_emb" / f"img_emb_{number:04d}.npy", folder / "metadata" / f"metadata_{number:04d}.parquet"


def shard_stamp(encoder, made_of):
    """Return a hash that tells whether a shard was made from these image files and captions by this encoder."""
    return hashlib.sha256(json.dumps([encoder, made_of]).encode()).hexdigest()


def count_records(images, found, records=0):
    """Return how many rows, images, captions and empty captions a shard or store has.

    Args:
        images: {readable picture or Sentence: its records}.
        found: how many pictures there were, readable or not.
        records: how many records all those pictures have.
    """
    texts = any(isinstance(path, Sentence) for path in images)
    captions = [record["caption"] for same in images.values() for record in same if "caption" in record]
    full = sum(bool(caption.strip()) for caption in captions)
    return {
        "rows": len(images), "images_found": 0 if texts else found, "images": 0 if texts else len(images),
        "captions": full, "empty_captions": len(captions) - full, "records": records,
    }  # fmt: skip


def write_shard(folder, number, stamp, embeddings, images, skipped, counts=None):
    """Write one shard; an older parquet goes first and the new one comes last, so a shard with a parquet is complete.

    Args:
        folder: of the store.
        stamp: see `shard_stamp`.
        embeddings: [n, D], or [n, K, D], float32 tensor, or an object whose slices are such tensors.
        images: {image file or Sentence: its records}, n of them; records hold `caption`, unless the store is of
            pictures alone, and `image_id`, unless it is of texts alone.
        skipped: {image file: why it is in no row}.
        counts: as `count_records` returns them; None where only images are skipped.
    """
    counts = counts or count_records(images, len(images) + len(skipped))
    npy, parquet = shard_files(folder, number)
    parquet.unlink(missing_ok=True)
    with atomic_path(npy) as temporary, open(temporary, "wb") as file:
        described = {"descr": "<f2", "fortran_order": False, "shape": tuple(embeddings.shape)}
        np.lib.format.write_array_header_1_0(file, described)
        for start in range(0, len(embeddings), WRITTEN):  # tokens of a whole shard may not fit in memory
            file.write(embeddings[start : start + WRITTEN].half().numpy().tobytes())
    ids, columns = [same[0].get("image_id") for same in images.values()], {}
    if not any(isinstance(path, Sentence) for path in images):
        columns["image_path"] = pa.array(map(as_text, images), pa.string())
    if None not in ids:
        numbers = all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids)
        columns["image_id"] = pa.array(ids, pa.int64()) if numbers else pa.array(map(str, ids), pa.string())
    if all("caption" in record for same in images.values() for record in same):
        captions = [[text for record in same if (text := record["caption"]).strip()] for same in images.values()]
        columns["caption"] = pa.array((texts[0] if texts else "" for texts in captions), pa.string())
        columns["captions"] = pa.array(captions, pa.list_(pa.string()))
    made = {"stamp": stamp, "skipped": skipped, "counts": counts, "reader": reader()}
    table = pa.table(columns).replace_schema_metadata({STAMP: json.dumps(made)})
    with atomic_path(parquet) as temporary:
        pq.write_table(table, temporary)


def remove_shards(folder, count):
    """Delete the shards from number `count` on, which an earlier run with more images left."""
    while any(file.is_file() for file in shard_files(folder, count)):
        for file in shard_files(folder, count):
            file.unlink(missing_ok=True)
        count += 1


def finished_shards(folder, parts, stamps):
    """Return the shards on disk that need not be made again.

    A shard that left out an image which can be read by now, with a larger --max_pixels or a new decoder, is made again.

    Args:
        folder: of the store.
        parts: of the Source, one per shard.
        stamps: one per part.
    Returns: {number: ({image file: why it was skipped}, counts as `count_records` returns them)}.
    """
    finished = {number: _finished_shard(folder, number, stamp) for number, stamp in enumerate(stamps)}
    finished = {number: stored for number, stored in finished.items() if stored is not None}
    stale = set()
    for number in share(sorted(finished)):
        stored = finished[number]
        if stored["skipped"] and parts[number].has_readable(stored["skipped"], stored.get("reader")):
            stale.add(number)
    stale = all_union(stale)  # waits until all processes have seen which shards there are
    return {
        number: (stored["skipped"], stored.get("counts") or _count_again(parts[number], stored["skipped"]))
        for number, stored in finished.items()
        if number not in stale
    }


def _count_again(part, skipped):
    """Return the counts of a shard that was written before shards kept them."""
    pictures, _ = part.read()
    return count_records({path: same for path, same in pictures.items() if str(path) not in skipped}, len(pictures))


def _finished_shard(folder, number, stamp):
    """Return what `write_shard` noted in a complete shard with this stamp, or None where there is no such shard."""
    npy, parquet = shard_files(folder, number)
    if not (npy.is_file() and parquet.is_file()):
        return None
    try:
        stored = json.loads((pq.read_schema(parquet).metadata or {}).get(STAMP, b"{}"))
        if stored.get("stamp") != stamp or len(_map_array(npy)) != pq.read_metadata(parquet).num_rows:
            return None
    except (pa.ArrowException, OSError, ValueError):  # damaged: made again
        return None
    return stored


class MappedEmbeddings:
    """Rows of several npy files as one [N, D], or [N, K, D], array on the disk."""

    def __init__(self, files):
        """Map the files.

        Args:
            files: npy files, each [n, D], or [n, K, D], of floats.
        Raises: ValueError naming the file that is damaged or does not fit the first one.
        """
        self.files, self.parts = files, [_map_array(file) for file in files]
        row = self.parts[0].shape[1:]
        for file, part in zip(files, self.parts, strict=True):
            if part.shape[1:] != row:
                raise ValueError(
                    f"{file} has rows of {in_words(part.shape[1:])}, and {files[0]} of {in_words(row)}: they are of "
                    f"two encoders"
                )
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.shape = (int(self.ends[-1]), *row)
        self.dtype = np.result_type(*self.parts)
        self.mapped = FAULT + math.prod(row) * self.dtype.itemsize  # bytes that reading a row maps, at most
        self.gathered = 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Gather rows.

        Args:
            rows: [B] row numbers.
        Returns: [B, D], or [B, K, D], tensor of the stored dtype: float16 halves the copy to a GPU.
        Raises: ValueError naming the file and row that holds NaN or infinity.
        """
        rows = np.asarray(rows)
        parts = np.searchsorted(self.ends, rows, side="right")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part in np.unique(parts):
            chosen = np.flatnonzero(parts == part)
            within = rows[chosen] - (self.ends[part] - len(self.parts[part]))
            self._ask_ahead(self.parts[part], within)
            out[chosen] = self.parts[part][within]
        out = torch.from_numpy(out)
        few = max(1, LOOKED_AT // math.prod(self.shape[1:]))
        for start in range(0, len(out), few):
            sums = out[start : start + few].float().flatten(1).sum(1)  # finite where all numbers are
            if not torch.isfinite(sums).all():
                self._refuse(rows[start + int((~torch.isfinite(sums)).nonzero()[0])])
        self.gathered += len(rows) * self.mapped
        if self.gathered >= MAPPED:
            self._give_pages_back()
        return out

    def _ask_ahead(self, part, rows):
        """Let the system prefetch rows that span several pages, not read each page at its page fault."""
        size = math.prod(self.shape[1:]) * part.itemsize
        if size > mmap.PAGESIZE and hasattr(mmap, "MADV_WILLNEED"):
            for row in rows:
                start = part.offset + int(row) * size
                page = start - start % mmap.PAGESIZE
                part._mmap.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def _refuse(self, row):
        """Raise ValueError for a row with NaN or infinity, naming its file."""
        part = int(np.searchsorted(self.ends, row, side="right"))
        within = row - (self.ends[part] - len(self.parts[part]))
        raise ValueError(f"{self.files[part]}, row {within} holds NaN or infinity; extract it again")

    def update(self, digest):
        """Feed a hashlib digest with the numbers as they are stored; see FINGERPRINTED."""
        digest.update(repr([(len(part), part.dtype.str) for part in self.parts]).encode())
        size = math.prod(self.shape[1:]) * self.parts[0].itemsize
        rows = max(1, PIECE // size)
        pieces = [(part, start) for part in self.parts for start in range(0, len(part), rows)]
        number = min(len(pieces), max(1, FINGERPRINTED // (rows * size)))
        for index in np.linspace(0, len(pieces) - 1, number).astype(int):
            part, start = pieces[index]
            digest.update(np.ascontiguousarray(part[start : start + rows]))
            self._give_pages_back()

    def _give_pages_back(self):
        """Unmap what was read: the system keeps it cached, but it no longer counts as this process' memory."""
        self.gathered = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            for part in self.parts:
                part._mmap.madvise(mmap.MADV_DONTNEED)


def _map_array(file):
    """Map one npy file.

    Raises: ValueError where it is damaged, with expected and found size, or holds no [n, D] or [n, K, D] floats.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({_shortfall(file) or reason(error)}); extract this shard again") from None
    if array.ndim not in (2, 3) or 0 in array.shape[1:] or array.dtype.kind != "f":
        raise ValueError(
            f"{file}: {list(array.shape)} {array.dtype} are no embeddings, which are [n, D] or [n, K, D] floats"
        )
    return array


def _shortfall(file):
    """Say how many bytes a truncated npy should have and has, or return ''."""
    try:
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)  # what np.save writes for plain numbers
            expected = stream.tell() + int(np.prod(shape)) * dtype.itemsize
    except ValueError:
        return ""
    found = file.stat().st_size
    return f"{expected:,} bytes expected, {found:,} found" if found < expected else ""


class MappedCaptions:
    """The captions of a folder of shards, kept as Arrow text: about 60 bytes each instead of a Python object's 400.

    Behaves as the list of records of a pickle: `len`, and `[i]` gives `image_id`, `caption`, `clip_embedding`.
    """

    def __init__(self, files, rows):
        """Read the parquet files.

        Args:
            files: parquet files, one per npy.
            rows: how many rows each npy has.
        Raises: ValueError naming the file that is damaged, does not fit its npy, or alone holds no captions.
        """
        texts, ids, embedding_index, first, columns = [], [], [], 0, {}
        for file, expected in zip(files, rows, strict=True):
            text, image_id, row, column = _read_metadata(file, expected, first)
            columns.setdefault(column, file)
            texts.append(text)
            ids.append(image_id)
            embedding_index.append(first + row)
            first += expected
        if None in columns and len(columns) > 1:
            raise ValueError(f"{columns.pop(None)} has no column caption, and {min(columns.values())} has")
        self.texts, self.ids = texts, ids
        self.ends = np.cumsum([len(text) for text in texts]).tolist()
        self.starts_of_rows = np.cumsum([0, *rows])
        self.embedding_index = np.concatenate(embedding_index)
        self.lengths = np.concatenate([pc.binary_length(pc.utf8_trim_whitespace(text)).to_numpy() for text in texts])

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, number):
        part = bisect.bisect_right(self.ends, number)
        row = int(self.embedding_index[number])
        caption = self.texts[part][int(number) - (self.ends[part] - len(self.texts[part]))].as_py()
        return {"image_id": self.image_id(row), "caption": caption, "clip_embedding": row}

    def image_id(self, row):
        """Return the id of a row's image, whether it has captions or not."""
        part = bisect.bisect_right(self.starts_of_rows, row) - 1
        return self.ids[part][row - int(self.starts_of_rows[part])].as_py()

    def update(self, digest):
        """Feed a hashlib digest with the row, the length and the bytes of every caption."""
        digest.update(self.embedding_index)
        for text in filter(len, self.texts):
            text = text.cast(pa.large_string())
            ends = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
            digest.update(ends - ends[0])
            digest.update(memoryview(text.buffers()[2] or b"")[ends[0] : ends[-1]])


def _read_metadata(file, rows, first):
    """Read one parquet.

    Args:
        file: parquet file.
        rows: how many the npy beside it has.
        first: number of its first row, in the whole store.
    Returns: (texts of n captions, image ids of `rows` rows, [n] row of each caption, column of the captions; None where
        there is none, for pictures alone).
    Raises: ValueError.
    """
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
        names = parquet.schema_arrow.names
        found = [name for name in ("captions", "caption", "image_id", "image_path") if name in names]
        table = parquet.read(found).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({reason(error)}); extract this shard again") from None
    if len(table) != rows:
        raise ValueError(f"{file} has {len(table):,} rows and the npy of its number {rows:,}; extract this shard again")
    ids = next((table[name] for name in ("image_id", "image_path") if name in found), None)
    ids = pa.array(range(first, first + rows)) if ids is None else ids.combine_chunks()
    if not {"captions", "caption"} & set(found):
        return pa.array([], pa.string()), ids, np.arange(0), None
    column = table[found[0]].combine_chunks()
    if found[0] == "captions":
        return pc.fill_null(column.flatten(), ""), ids, pc.list_parent_indices(column).to_numpy(), "caption"
    return pc.fill_null(column.cast(pa.string()), ""), ids, np.arange(rows), "caption"


def find_shards(folder, count=None):
    """Pair up a folder's files.

    Args:
        folder: of the store.
        count: how many shards there should be, if known.
    Returns: (npy files, parquet files), by number.
    Raises: FileNotFoundError where it holds no shards; ValueError naming a part that is missing.
    """
    folder = Path(folder)
    npy, parquet = ({_number(f): f for f in folder.glob(p)} for p in ("img_emb/*.npy", "metadata/*.parquet"))
    if not npy and not parquet:
        raise FileNotFoundError(
            f"{folder} holds no shards (img_emb/img_emb_0000.npy, metadata/metadata_0000.parquet, ...); make them with "
            f"parse_coco.py --out {folder}/, or check --data"
        )
    for number in range(max(count or 0, max(npy, default=0) + 1, max(parquet, default=0) + 1)):
        for files, wanted in zip((npy, parquet), shard_files(folder, number), strict=True):
            if number not in files:
                raise ValueError(f"{wanted} is missing: {folder} is not whole; extract it again, finished parts stay")
    numbers = sorted(npy)
    return [npy[n] for n in numbers], [parquet[n] for n in numbers]


def _number(file):
    """Return the number that ends a file's name."""
    match = re.search(r"(\d+)$", file.stem)
    return int(match[1]) if match else 0


def read_shards(folder, count=None):
    """Return (MappedEmbeddings, MappedCaptions) of a folder; raises as `find_shards` and the two classes do."""
    arrays, tables = find_shards(folder, count)
    embeddings = MappedEmbeddings(arrays)
    return embeddings, MappedCaptions(tables, [len(part) for part in embeddings.parts])
