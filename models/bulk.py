"""Captions at scale: a Source or a feature store in, a parquet file per part out, each written atomically.

    OUT/00000.parquet    key, caption, logprob, error; captions too, where a picture gets several
    OUT/_made_by.json    which captioner made them, and how

A finished part is kept unless what it was made from has changed. Several processes share out the parts.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.extraction import Reading, encode_parts, known_count
from features.images import reader
from features.listing import as_text
from features.loader import prepare_readers
from features.shards import MappedCaptions, shard_stamp
from features.store import check_encoders, read_store
from features.store_files import shard_rows
from features.tars import TarMember
from models.captioner import captioner_of, image_key
from models.made_by import MADE_BY, check_bulk
from models.rerank import draws_samples
from models.settings import CLIP
from utils.cli import note, progress_bar
from utils.devices import is_out_of_memory, pick_devices
from utils.distributed import all_gather, all_sum, connected, own_device
from utils.files import atomic_path, write_json
from utils.outputs import lock
from utils.processes import is_main, share, world_size

STAMP = b"clipcap"  # key of a parquet's metadata
ROWS_AT_ONCE = {"cpu": 256, "cuda": 1024}  # rows of a store per batch, unless --batch_size is given


class CaptionFolder:
    """A folder of captions, a parquet file per part."""

    def __init__(self, folder, made):
        """Take a folder, which need not exist, for the captions of one captioner.

        Args:
            folder: to write.
            made: the captioner, as `models.made_by.made_by` returns it.
        Raises: ValueError where it cannot be written, or holds captions of another captioner, or other files.
        """
        check_bulk(folder, made)
        self.folder, self.made = Path(folder), made

    def begin(self):
        """Record the captioner, before the first caption is written."""
        if is_main():
            write_json(self.folder / MADE_BY, {"made_by": self.made})

    def file(self, name):
        """Return a part's file."""
        return self.folder / f"{name}.parquet"

    def finished(self, name, of, stamp, part=None):
        """Return the counts of a part whose file is up to date, or None.

        Args:
            name, stamp: of the part.
            of: name of what it is made from.
            part: of a Source; None: rows of a store.
        Raises: ValueError where the file is damaged or holds captions of something else.
        """
        file = self.file(name)
        if not file.is_file():
            return None
        try:
            stored = json.loads((pq.read_schema(file).metadata or {})[STAMP])
        except (pa.ArrowException, OSError, ValueError, KeyError):
            raise ValueError(f"{file} is damaged or not of predict.py; remove it, or name another --out") from None
        if stored["of"] != of:
            raise ValueError(f"{file} holds captions of {stored['of']}, not of {of}; name another --out")
        if stored["stamp"] != stamp or (part and part.has_readable(stored["skipped"], stored["reader"])):
            return None
        return stored["counts"]

    def write(self, name, of, stamp, captions, skipped):
        """Write a part atomically.

        Args:
            name, of, stamp: as of `finished`.
            captions: (key, list of Caption, best first) pairs.
            skipped: {key: why there is no caption}.
        Returns: its counts.
        """
        keys, groups = [key for key, _ in captions] + list(skipped), [group for _, group in captions]
        none = [None] * len(skipped)
        columns = {
            "key": pa.array(keys, pa.string()),
            "caption": pa.array([group[0].text.strip() for group in groups] + none, pa.string()),
            "logprob": pa.array([group[0].logprob for group in groups] + none, pa.float64()),
            "error": pa.array([None] * len(groups) + list(skipped.values()), pa.string()),
        }
        if any(len(group) > 1 for group in groups):
            texts = [[caption.text.strip() for caption in group] for group in groups]
            columns["captions"] = pa.array(texts + none, pa.list_(pa.string()))
        counts = {"captions": len(captions), "errors": len(skipped)}
        made = {"of": of, "stamp": stamp, "counts": counts, "skipped": skipped, "reader": reader()}
        with atomic_path(self.file(name)) as temporary:
            pq.write_table(pa.table(columns).replace_schema_metadata({STAMP: json.dumps(made)}), temporary)
        return counts

    def tell(self, counts, parts, what):
        """Print the totals; every process must call it.

        Args:
            counts: {part's number: its counts}, of the parts that this process wrote or found finished.
            parts: number of parts.
            what: `images` or `rows`.
        Returns: the exit status: 2 where something has no caption.
        """
        all_counts = {number: own for process in all_gather(counts) for number, own in process.items()}
        captions, errors = (sum(own[key] for own in all_counts.values()) for key in ("captions", "errors"))
        note(f"{self.folder}/: {parts:,} files, {captions:,} captions")
        if errors:
            others = f"; the others are captioned, and the files in {self.folder}/ give the reasons" if captions else ""
            note(f"error: {errors:,} of {captions + errors:,} {what} could not be read{others}")
            return 2
        return 0


def caption_in_bulk(args, decoding, source, made, batch_size):
    """Caption into a folder of parquet files, in one process or several.

    Args:
        args: the command line of predict.py.
        decoding: DecodingConfig.
        source: Source of the pictures; None: --data is captioned.
        made: the captioner, as `made_by` returns it.
        batch_size: pictures at a time.
    Returns: the exit status.
    """
    store = None
    if args.data:
        store = read_store(args.data)
        if store.is_of_texts:
            raise ValueError(f"--data {args.data} holds embeddings of texts; name a store of images")
    workers = args.num_workers if source and (source.count or sys.maxsize) > batch_size else 0
    prepare_readers(source.count if source else 0, workers)
    device = own_device(pick_devices(args.device))
    if world_size() > 1:
        args.device = str(device)
    folder = CaptionFolder(args.out, made)
    with connected(device), lock(args.out) if is_main() else contextlib.nullcontext():
        captioner = captioner_of(args, with_encoder=not store or decoding.rerank == CLIP)
        try:
            if store:
                own = captioner.model.config.shape, captioner.described
                check_encoders(f"--data {store.path}", store, f"--checkpoint {args.checkpoint}", *own)
                return caption_store(captioner, store, folder, decoding, args.batch_size)
            reading = Reading(batch_size, workers)
            return caption_parts(captioner, source.parts(), folder, decoding, reading)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here") from None


class Batches:
    """Captions batches; one that does not fit the device's memory is halved, and so are later ones."""

    def __init__(self, captioner, decoding):
        self.captioner, self.decoding, self.most = captioner, decoding, sys.maxsize

    def __call__(self, embeddings, keys=None):
        """Caption embeddings [B, *shape]; returns per row a list of Caption, best first.

        `keys`: see `generate_captions`.
        """
        captions = []
        while len(captions) < len(embeddings):
            rows = slice(len(captions), len(captions) + self.most)
            batch = embeddings[rows]
            try:
                captions += self.captioner.caption_embeddings(batch, self.decoding, keys and keys[rows])
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            # not in the handler: until that ends, the error keeps the tensors that filled the memory alive
            self.most = len(batch) // 2
            note(f"warning: {len(batch)} captions do not fit in memory; going on with {self.most} at a time")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return captions


def caption_parts(captioner, parts, folder, decoding, reading):
    """Caption the pictures of a Source's parts.

    Args:
        captioner: Captioner.
        parts: of a Source.
        folder: CaptionFolder.
        decoding: DecodingConfig.
        reading: features.extraction.Reading.
    Returns: the exit status.
    """
    caption = Batches(captioner, decoding)
    stamps = [shard_stamp(folder.made, part.made_of()) for part in parts]
    counts = {n: folder.finished(part.name, part.of, stamps[n], part) for n, part in enumerate(parts)}
    own, counts = _begin(folder, counts)
    todo, captions = [parts[number] for number in own], []
    with progress_bar(known_count(todo), "images", "img") as bar:
        for plan, pictures, embeddings in encode_parts(captioner.encoder, todo, [()] * len(todo), reading, bar):
            if pictures:
                keys = [image_key(picture) for picture in pictures] if draws_samples(decoding) else None
                captions += zip(map(picture_key, pictures), caption(embeddings, keys), strict=True)
                continue
            number, part = own[plan.number], plan.part
            names = {str(picture): picture_key(picture) for picture in plan.keys}
            skipped = {
                names.get(name) or name.removeprefix(f"{part.of}/"): reason for name, reason in plan.skipped.items()
            }
            counts[number] = folder.write(part.name, part.of, stamps[number], captions, skipped)
            captions = []
    return folder.tell(counts, len(parts), "images")


def picture_key(picture):
    """Return the key of a picture's row: its path, or the name without ending of a tar's member."""
    return os.path.splitext(picture.name)[0] if isinstance(picture, TarMember) else as_text(picture)


def _begin(folder, counts):
    """Begin the folder; returns (numbers of the parts that this process makes, counts of the finished parts)."""
    finished = {number: own for number, own in counts.items() if own is not None}
    all_sum(0)  # a barrier: no process writes before all have looked
    folder.begin()
    if finished and len(finished) < len(counts):
        note(f"going on: {len(finished):,} of {len(counts):,} files are there")
    return share([number for number in counts if number not in finished]), finished


def caption_store(captioner, store, folder, decoding, batch_size):
    """Caption the rows of a FeatureStore; arguments as those of `caption_parts`.

    Args:
        batch_size: rows at a time; None: ROWS_AT_ONCE of the device.
    """
    parts, caption = store_parts(store), Batches(captioner, decoding)
    batch_size = batch_size or ROWS_AT_ONCE.get(captioner.device.type, 256)
    of, ids = str(store.path), row_ids(store)
    lengths = store.clip_embedding[np.arange(min(8, len(store.clip_embedding)))].float().norm(dim=-1)
    if not captioner.model.config.normalize_prefix and torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        note(f"warning: the embeddings of {of} are normalised, and those the captioner was trained on may not be")
    stamps = [shard_stamp(folder.made, made_of) for _, _, made_of in parts]
    own, counts = _begin(folder, {n: folder.finished(parts[n][0], of, stamp) for n, stamp in enumerate(stamps)})
    with progress_bar(sum(len(parts[number][1]) for number in own), "rows", "row") as bar:
        for number in own:
            name, rows, _ = parts[number]
            groups = []
            for start in range(0, len(rows), batch_size):
                batch = np.asarray(rows[start : start + batch_size])
                groups += caption(store.clip_embedding[batch].float())
                bar.update(len(batch))
            captions = list(zip(map(ids, rows), groups, strict=True))
            counts[number] = folder.write(name, of, stamps[number], captions, {})
    return folder.tell(counts, len(parts), "rows")


def store_parts(store):
    """Return a FeatureStore's parts, one per shard: (name, range of rows, plain data that changes when the rows do)."""
    if isinstance(store.captions, MappedCaptions):
        files = store.clip_embedding.files
        ends = [int(end) for end in store.clip_embedding.ends]
    else:
        size = shard_rows(len(store.clip_embedding))
        files = [store.path] * -(-len(store.clip_embedding) // size)
        ends = [min(end, len(store.clip_embedding)) for end in range(size, len(files) * size + 1, size)]
    parts = []
    for number, (file, start, end) in enumerate(zip(files, [0, *ends], ends, strict=False)):
        status = os.stat(file)
        parts.append((
            f"captions_{number:04d}", range(start, end), [str(file), status.st_size, status.st_mtime_ns, start, end]
        ))  # fmt: skip
    return parts


def row_ids(store):
    """Return a function that maps a row to its caption's key: the image's id as text, else the row's number."""
    if isinstance(store.captions, MappedCaptions):
        return lambda row: str(store.captions.image_id(row))
    ids = {record["clip_embedding"]: record.get("image_id") for record in reversed(store.captions)}
    ids |= {row: record.get("image_id") for row, record in enumerate(store.images or ())}
    return lambda row: str(row if ids.get(row) is None else ids[row])
