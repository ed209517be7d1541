"""Pictures or captions -> encoder -> feature store: resumable, in one process or several.

The input is a Source, the output a pickle or a folder of shards, with its json. parse_coco.py is the command.
"""

import collections
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from encoders import known_encoder, load_encoder
from features.listing import as_line
from features.loader import encode_files, prepare_readers
from features.partial import PartialStore, collect_rows, partial_names
from features.shards import count_records, finished_shards, remove_shards, shard_files, shard_stamp, write_shard
from features.sources import fingerprint
from features.store import write_store
from features.store_files import info_path, is_folder, lock_store
from features.texts import TextEncoder
from utils.cli import VERSION, note, progress_bar
from utils.devices import pick_device
from utils.distributed import all_sum, all_union, connected, main_first, own_device
from utils.files import read_json, sha256, write_json
from utils.processes import is_main, rank, share

HELD = 8 << 30  # bytes of embeddings above which a pickle gets a warning
SHOWN = 10  # skipped images that are listed on the terminal; the json beside the store lists all


@dataclass
class Reading:
    """How pictures are read and encoded.

    Args:
        batch_size: pictures per call of the encoder.
        num_workers: processes that read and preprocess pictures.
        strict: stop at the first picture that cannot be read, or that a part leaves out.
    """

    batch_size: int = 64
    num_workers: int = 0
    strict: bool = False


@dataclass
class Planned:
    """A part whose batches are on their way through the encoder.

    Args:
        number: of the part, in the order given.
        part: Part.
        pictures: {picture: [its records]}; those that turn out unreadable are taken out.
        keys: {picture: its fingerprint, taken before it is read, as the file may change meanwhile}.
        skipped: {name: why it is left out}.
        batches: how many have not been encoded yet.
        records: how many all pictures have together, unreadable ones included.
    """

    number: int
    part: object
    pictures: dict
    keys: dict
    skipped: dict
    batches: int
    records: int


def encode_parts(encoder, parts, encoded, reading, bar):
    """Encode the pictures that parts still lack, in one stream of batches; no batch spans two parts.

    Args:
        parts: of a Source.
        encoded: per part, the fingerprints of pictures that are encoded already.
        bar: progress bar of pictures.
    Yields: (Planned, a batch's readable pictures, their embeddings [B, *shape]); (Planned, None, None) when a part is
        done.
    Raises: ValueError at the first fault with `reading.strict`, and where the encoder gives NaN.
    """
    planned = collections.deque()

    def batches():
        for number, (part, done) in enumerate(zip(parts, encoded, strict=True)):
            pictures, skipped = part.read()
            if skipped and reading.strict:
                refuse(*next(iter(skipped.items())))
            keys = {picture: fingerprint(picture) for picture in pictures}
            missing = [picture for picture in pictures if keys[picture] not in done]
            own = [missing[start : start + reading.batch_size] for start in range(0, len(missing), reading.batch_size)]
            records = sum(map(len, pictures.values()))
            planned.append(Planned(number, part, dict(pictures), keys, dict(skipped), len(own), records))
            yield from own

    def finished():
        while planned and not planned[0].batches:
            yield planned.popleft(), None, None

    if isinstance(encoder, TextEncoder):
        stream = encoder.encode_sentences(batches())
    else:
        stream = encode_files(encoder, None, batches(), reading.num_workers)
    for pictures, embeddings, errors in stream:
        yield from finished()  # earlier parts that lacked nothing
        plan = planned[0]
        if errors and reading.strict:
            refuse(*next(iter(errors.items())))
        bad = ~torch.isfinite(embeddings).flatten(1).all(1)
        if bad.any():
            raise ValueError(f"{encoder.name} gives NaN for {pictures[int(bad.nonzero()[0])]}: check its file")
        for picture, reason in errors.items():
            del plan.pictures[picture]
            plan.skipped[str(picture)] = reason
        plan.batches -= 1
        if pictures:
            yield plan, pictures, embeddings
        bar.update(len(pictures) + len(errors))
        yield from finished()
    yield from finished()


def refuse(name, reason):
    """Stop at a fault, as --strict asks for; raises ValueError."""
    raise ValueError(f"{name}: {reason}; mend or remove it, or leave out --strict")


def going_on(encoded, total):
    """Say how many pictures an earlier run has encoded; `total` is None where it is unknown."""
    if encoded:
        note(f"going on: {encoded:,}{f' of {total:,}' if total is not None else ''} images are already encoded")


def known_count(parts):
    """Return how many pictures parts have, or None where a part must be read first to tell."""
    counts = [part.count for part in parts]
    return None if None in counts else sum(counts)


def write_pickle(encoder, source, out, reading, info):
    """Encode all pictures into one pickle, each process its share; arguments as those of `write_folder`.

    Each process keeps its rows in its own PartialStore; an earlier run's are used, however many processes it had.
    """
    identity, size = encoder.identity(), (source.count or 0) * math.prod(encoder.shape) * 4
    if size > HELD:
        note(f"warning: {out}, of {size / 1e9:.0f} GB, will be held in memory whole; shards are not: --out DIR/")
    encoded = all_union({key for name in share(partial_names(out)) for key in PartialStore.encoded(name, identity)})
    parts = source.shares(encoded)
    own = known_count(parts)
    going_on(len(encoded) if own is None else source.count - int(all_sum(own)), source.count)
    partial, unreadable = PartialStore(f"{out}.rank{rank()}" if rank() else out, identity), {}
    with progress_bar(own, "images", "img") as bar:
        for plan, pictures, embeddings in encode_parts(encoder, parts, [encoded] * len(parts), reading, bar):
            if pictures:
                partial.append([plan.keys[picture] for picture in pictures], embeddings)
            else:
                unreadable |= plan.skipped
    partial.close()
    unreadable = all_union(unreadable)  # waits for all processes
    pictures, left_out = source.read()
    skipped = source.skipped | left_out | unreadable
    read = {picture: records for picture, records in pictures.items() if str(picture) not in skipped}
    counts = count_records(read, len(pictures), sum(map(len, pictures.values())))
    summary = summarize(source, counts, skipped, reading.strict)
    if is_main():
        partials = [PartialStore(name, identity) for name in partial_names(out)]
        embeddings = collect_rows(partials, [fingerprint(picture) for picture in read])
        alone = not counts["captions"] + counts["empty_captions"]
        images = [records[0] for records in read.values()] if alone else None
        write_store(out, embeddings, build_captions(read), info | summary, images)
        for partial in partials:
            partial.remove()
    return summary


def write_folder(encoder, source, out, reading, info):
    """Encode the pictures into shards, one per part, each process its share; finished shards on disk stay.

    Args:
        source: Source.
        out: folder to write.
        info: for the json beside it.
    Returns: the json's counts and skipped images.
    Raises: ValueError where no caption is left.
    """
    parts, identity = source.parts(), encoder.identity()
    stamps = [shard_stamp(identity, part.made_of()) for part in parts]
    finished = finished_shards(out, parts, stamps)
    todo = [number for number in range(len(parts)) if number not in finished]
    if todo and is_main():  # until all shards are new, the folder is no valid store
        info_path(out).unlink(missing_ok=True)
    own, made = share(todo), {}
    files = [shard_files(out, number)[0] for number in own]
    encoded = [PartialStore.encoded(file, identity) for file in files]
    count = known_count([parts[number] for number in own])
    done = 0
    for number, keys in zip(own, encoded, strict=True):
        done += sum(fingerprint(picture) in keys for picture in parts[number].read()[0]) if keys else 0
    going_on(done, count)
    partial = None
    with progress_bar(count, "images", "img", initial=done) as bar:
        for plan, pictures, embeddings in encode_parts(encoder, [parts[n] for n in own], encoded, reading, bar):
            partial = partial or PartialStore(files[plan.number], identity)
            if pictures:
                partial.append([plan.keys[picture] for picture in pictures], embeddings)
                continue
            number, counts = own[plan.number], count_records(plan.pictures, len(plan.keys), plan.records)
            rows = partial.embeddings([plan.keys[picture] for picture in plan.pictures])
            write_shard(out, number, stamps[number], rows, plan.pictures, plan.skipped, counts)
            partial.remove()
            partial, made[number] = None, (plan.skipped, counts)
    made = finished | all_union(made)  # waits for all processes
    skipped, total = dict(source.skipped), collections.Counter()
    for number in range(len(parts)):
        left_out, counts = made[number]
        skipped |= left_out
        total.update(counts)
    summary = summarize(source, total, skipped, reading.strict)
    if is_main():
        remove_shards(out, len(parts))
        write_json(info_path(out), info | summary | {"shards": len(parts)})
    return summary


def summarize(source, counts, skipped, strict):
    """Return what the json beside a store says of its contents.

    Args:
        source: Source.
        counts: see `count_records`.
        skipped: {image file, id or place: why it is left out}.
        strict: refuse records without a picture.
    Raises: ValueError where no caption is left, or, without any captions, no picture; and where `strict` refuses.
    """
    rows, captions, empty = (counts[key] for key in ("rows", "captions", "empty_captions"))
    if not captions and (empty or not rows):
        report_skipped(skipped)
        what = "captions" if rows else "images"
        raise ValueError(f"no {what} left: {len(skipped):,} images could not be read and {empty:,} captions are empty")
    alone = (source.records or 0) - counts["records"]
    if alone > 0:
        said = f"{alone:,} of {source.records:,} records have no picture in the tars"
        if strict:
            raise ValueError(f"{said}; name all tars, or leave out --strict")
        note(f"warning: {said}")
    reasons = dict(collections.Counter(skipped.values()).most_common())
    counts = {key: counts[key] for key in ("images_found", "images", "captions", "empty_captions")}
    counts |= {"records_without_image": alone} if alone > 0 else {}
    return counts | {"images_skipped": len(skipped), "skipped_by_reason": reasons, "skipped": skipped}


def build_captions(read):
    """Give every caption that is not empty the row of its picture.

    Args:
        read: {readable picture: its records}, in row order.
    Returns: records; none for pictures without captions.
    """
    return [
        {**record, "clip_embedding": row}
        for row, records in enumerate(read.values())
        for record in records
        if record.get("caption", "").strip()
    ]


def is_done(out, info, source):
    """Tell whether the store exists, was made from the same inputs and skipped nothing that may be readable by now."""
    if not (Path(out).is_file() and info_path(out).is_file()):
        return False
    stored = read_json(info_path(out))
    made_of = ("clip_model_type", "dtype", "annotations_sha256", "split", "made_of")
    same = known_encoder(stored) == known_encoder(info) and all(stored.get(key) == info[key] for key in made_of)
    return same and not source.has_readable(stored.get("skipped") or {})


def report_skipped(skipped):
    """List the first skipped images."""
    for name, reason in list(skipped.items())[:SHOWN]:
        note(f"skipped {as_line(name)}: {reason}")
    if len(skipped) > SHOWN:
        note(f"... and {len(skipped) - SHOWN:,} more; the json beside the store lists them all")


def extract(args, source, out):
    """Embed what a command line of parse_coco.py names; returns the exit status.

    Args:
        args: the command line.
        source: Source.
        out: store to write.
    """
    prepare_readers(0 if args.text_only else source.count, args.num_workers)
    device = own_device([pick_device(args.device)])
    with connected(device), lock_store(out) if is_main() else contextlib.nullcontext():
        with main_first():
            encoder = load_encoder(args.clip_model_type, device, args.dtype, args.tokens)
        info = {
            "annotations": args.annotations, "annotations_sha256": args.annotations and sha256(args.annotations),
            "split": args.split,
        }  # fmt: skip
        if args.text_only:
            encoder = TextEncoder(encoder)
            info["texts_cut"] = cut = encoder.count_cut(source.pictures)
            if cut:
                note(f"warning: {cut:,} of {source.count:,} captions are longer than the text tower reads, and are cut")
        return make_store(encoder, source, out, Reading(args.batch_size, args.num_workers, args.strict), info)


def make_store(encoder, source, out, reading, info):
    """Encode a source and write the store, unless it is complete.

    Args:
        encoder: ImageEncoder, or TextEncoder for a source of Sentences.
        source: Source.
        out: pickle or folder to write, which the caller has locked with `lock_store`.
        reading: Reading.
        info: what the json beside the store says of the source: `annotations`, `annotations_sha256`, `split`.
    Returns: the exit status.
    Raises: ValueError where nothing is left, and as `encode_parts`.
    """
    folder, texts = is_folder(out), isinstance(encoder, TextEncoder)
    info = {
        **encoder.describe(), "normalized": False, **info, "modality": "text" if texts else "image",
        "made_of": shard_stamp(encoder.identity(), source.made_of()),
        "versions": {"clipcap": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    if not source.skipped and not folder and is_done(out, info, source):
        what = "captions" if texts else "images"
        count = source.count or read_json(info_path(out))[what]
        note(f"{out} is complete: {count:,} {what} of {info['annotations'] or 'no annotations'}; nothing to do")
        return 0
    if folder:
        Path(out).mkdir(parents=True, exist_ok=True)
    try:
        done = (write_folder if folder else write_pickle)(encoder, source, out, reading, info)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    report_skipped(done["skipped"])
    empty = f"{done['empty_captions']:,} empty captions left out, " if done["empty_captions"] else ""
    images = "" if texts else f"{done['images']:,} images, "
    what = "records" if texts else "images"
    note(f"{out}: {images}{done['captions']:,} captions, {empty}{done['images_skipped']:,} {what} skipped")
    return 0
