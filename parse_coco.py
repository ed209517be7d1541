"""Extract CLIP features: images + annotations -> feature store.

    python parse_coco.py --clip_model_type ViT-B/32

reads data/coco/annotations/train_caption.json and the images of data/coco/train2014 and val2014, and writes
data/coco/oscar_split_ViT-B_32_train.pkl. Each image is encoded once, however many captions it has. Killed and run
again, it goes on where it was; images that are missing or cannot be read are listed and left out. With --out DIR/ the
store is a folder of shards in clip-retrieval's layout, which train.py maps instead of loading. --check lists every bad
record without encoding.

    python parse_coco.py --clip_model_type ViT-B/32 --images photos/ --no_captions --out data/photos.pkl

makes a store of pictures alone, all of these folders, which train_scst.py --reward clip learns from. With --text_only
the captions alone are embedded, by the encoder's text tower, for train.py --noise_angle.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
import itertools
import os
from pathlib import Path

import torch
import transformers

from encoders import known_encoder, load_encoder
from features.annotations import FORMATS
from features.check import find_faults
from features.images import add_max_pixels_flag, set_max_pixels
from features.inputs import ANNOTATIONS, fill_inputs, gather
from features.loader import encode_files, prepare_readers
from features.partial import PartialStore, collect_rows, partial_names
from features.shards import finished_shards, remove_shards, shard_files, shard_rows, shard_stamp, write_shard
from features.store import check_store_output, info_path, is_folder, lock_store, write_store
from features.texts import Sentence, TextEncoder
from utils.cli import VERSION, Parser, non_negative_int, note, positive_int, progress_bar, run
from utils.devices import pick_device
from utils.distributed import all_union, connected, is_main, main_first, own_device, rank, share
from utils.files import read_json, sha256, write_json
from utils.precision import add_dtype_flag

SHOWN = 10  # skipped images that are listed on the terminal; the json beside the store lists all


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--annotations", metavar="F", help=f"{FORMATS} (default: {ANNOTATIONS})")
    data.add_argument(
        "--images", nargs="+", metavar="DIR",
        help="folders of images, searched in this order (default: data/coco/train2014 and val2014)",
    )  # fmt: skip
    alone = data.add_mutually_exclusive_group()
    alone.add_argument(
        "--no_captions", action="store_true", help="take pictures alone: all of --images' folders, files or globs"
    )
    alone.add_argument(
        "--text_only", action="store_true",
        help="embed the captions alone, a row each; --annotations may be a .txt of one sentence per line, too",
    )  # fmt: skip
    data.add_argument("--split", default="train", help="split of a Karpathy file; train includes restval")
    data.add_argument(
        "--out", help="pickle to write, or DIR/ for shards (default: data/coco/oscar_split_{model}_{split}.pkl)"
    )
    data.add_argument("--strict", action="store_true", help="stop at the first bad row, missing or unreadable image")
    data.add_argument(
        "--check", action="store_true", help="print every bad record as place, file, reason; encode nothing"
    )
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--clip_model_type", default="ViT-B/32", help="a name of OpenAI's clip, or the path of a CLIP .pt"
    )
    encoder.add_argument("--batch_size", type=positive_int, default=64, help="images per call of the encoder")
    encoder.add_argument(
        "--num_workers", type=non_negative_int, default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)",
    )  # fmt: skip
    add_max_pixels_flag(encoder)
    encoder.add_argument("--device", help="torch device (default: a GPU if there is one)")
    add_dtype_flag(encoder)
    return parser


def default_out(clip_model_type, split):
    """Return the predecessors' name of the store of a model and split; other ones for what stands alone."""
    model = Path(clip_model_type).stem if Path(clip_model_type).is_file() else clip_model_type.replace("/", "_")
    return f"data/coco/oscar_split_{model}_{split}.pkl"


def file_key(path):
    """Return what tells whether an image file is still the one that was encoded: name, bytes, time in ns.

    A Sentence is that itself.
    """
    if isinstance(path, Sentence):
        return path
    status = os.stat(path)
    return str(path), status.st_size, status.st_mtime_ns


def stamp_of(encoder, images):
    """Return what tells whether a store or shard was made of these, {image file: its records}, by this encoder."""
    made_of = [(*file_key(path), *(record.get("caption") for record in same)) for path, same in images.items()]
    return shard_stamp(encoder.identity(), made_of)


def encode(encoder, paths, batches, args, bar):
    """Encode image files.

    Args:
        batches: lists of indices into `paths`.
    Yields: per batch (image files, [B, D] embeddings, {image file: why it could not be read}).
    Raises: ValueError at the first unreadable one with --strict, and where the encoder gives NaN.
    """
    if args.text_only:
        encoded = encoder.encode_sentences(paths, batches)
    else:
        encoded = encode_files(encoder, paths, batches, args.num_workers)
    for indices, embeddings, errors in encoded:
        if errors and args.strict:
            index, reason = next(iter(errors.items()))
            raise ValueError(f"{paths[index]}: {reason}; mend or remove it, or leave out --strict")
        bad = ~torch.isfinite(embeddings).all(1)
        if bad.any():
            raise ValueError(f"{encoder.name} gives NaN for {paths[indices[int(bad.nonzero()[0])]]}: check its file")
        yield [paths[i] for i in indices], embeddings, {str(paths[i]): reason for i, reason in errors.items()}
        bar.update(len(indices) + len(errors))


def extract(encoder, parts, args):
    """Encode what the parts of a store still lack, the images of all of them in one stream.

    Args:
        parts: (file that is made, {image file: its records}) pairs.
    Yields: per part (file, {readable image file: its records}, [N, D] their embeddings, {image file: why it could not
        be read}); what its rows were kept in is removed when the next one is asked for.
    """
    images, identity = sum(len(found) for _, found in parts), encoder.identity()
    keys = {path: file_key(path) for _, found in parts for path in found}  # before they are read: one may change then
    todo, batches, counts = [], [], []
    for file, found in parts:
        encoded = PartialStore.encoded(file, identity)
        missing = [path for path in found if keys[path] not in encoded]
        indices = range(len(todo), len(todo) + len(missing))
        own = [indices[start : start + args.batch_size] for start in range(0, len(missing), args.batch_size)]
        todo, batches, counts = todo + missing, batches + own, [*counts, len(own)]
    if len(todo) < images:
        note(f"going on: {images - len(todo):,} of {images:,} images are already encoded")
    with progress_bar(images, "images", "img", initial=images - len(todo)) as bar:
        stream = encode(encoder, todo, batches, args, bar)
        for (file, found), count in zip(parts, counts, strict=True):
            partial, skipped = PartialStore(file, identity), {}
            for files, embeddings, errors in itertools.islice(stream, count):
                if files:
                    partial.append([keys[path] for path in files], embeddings)
                skipped |= errors
            read = {path: records for path, records in found.items() if str(path) not in skipped}
            yield file, read, partial.embeddings([keys[path] for path in read]), skipped
            partial.remove()


def write_pickle(encoder, found, out, args, info, skipped):
    """Encode all images into one pickle, each process its share; arguments as those of `write_folder`.

    Each process keeps its rows in a PartialStore of its own; those of an earlier run count, however many it had.
    """
    identity = encoder.identity()
    encoded = all_union({key for name in share(partial_names(out)) for key in PartialStore.encoded(name, identity)})
    todo = [path for path in found if file_key(path) not in encoded]
    if len(todo) < len(found):
        note(f"going on: {len(found) - len(todo):,} of {len(found):,} images are already encoded")
    part = f"{out}.rank{rank()}" if rank() else out, {path: found[path] for path in share(todo)}
    *_, unreadable = next(extract(encoder, [part], args))  # not asked for more, it leaves the rows where they are
    skipped = skipped | all_union(unreadable)  # waits for all processes
    read = {path: records for path, records in found.items() if str(path) not in skipped}
    captions, empty = build_captions(read)
    summary = summarize(read, skipped, len(captions), empty)
    if is_main():
        partials = [PartialStore(name, identity) for name in partial_names(out)]
        embeddings = collect_rows(partials, [file_key(path) for path in read])
        images = [records[0] for records in read.values()] if args.no_captions else None
        write_store(out, embeddings, captions, info | summary, images)
        for partial in partials:
            partial.remove()
    return summary


def write_folder(encoder, found, out, args, info, skipped):
    """Encode the images into shards, each process its share; those on the disk already, made of the same, stay.

    Args:
        found: {image file: its records}.
        out: folder to write.
        info: for the json beside it.
        skipped: {image file or id: why it has been left out so far}.
    Returns: the json's counts and skipped images.
    Raises: ValueError where no caption is left.
    """
    paths, rows = list(found), shard_rows(len(found))
    parts, stamps = [], {}
    for number, start in enumerate(range(0, len(paths), rows)):
        images = {path: found[path] for path in paths[start : start + rows]}
        stamps[shard_files(out, number)[0]] = number, stamp_of(encoder, images)
        parts.append((shard_files(out, number)[0], images))
    finished = finished_shards(out, stamps)
    parts = [(file, images) for file, images in parts if file not in finished]
    skipped = skipped | {path: reason for left_out in finished.values() for path, reason in left_out.items()}
    if parts and is_main():  # until all shards are new, the older store is none
        info_path(out).unlink(missing_ok=True)
    unreadable = {}
    for file, read, embeddings, errors in extract(encoder, share(parts), args):
        write_shard(out, *stamps[file], embeddings, read, errors)
        unreadable |= errors
    skipped = skipped | all_union(unreadable)  # waits for all processes
    read = {path: records for path, records in found.items() if str(path) not in skipped}
    captions, empty = build_captions(read)
    summary = summarize(read, skipped, len(captions), empty)
    if is_main():
        remove_shards(out, -(-len(paths) // rows))
        write_json(info_path(out), info | summary | {"shards": -(-len(paths) // rows)})
    return summary


def summarize(read, skipped, captions, empty):
    """Return what the json beside a store says of its contents.

    Raises: ValueError where no caption is left, or no picture of those alone.
    """
    if not captions and (empty or not read):
        report_skipped(skipped)
        what = "captions" if read else "images"
        raise ValueError(f"no {what} left: {len(skipped):,} images could not be read and {empty:,} captions are empty")
    texts = any(isinstance(path, Sentence) for path in read)
    counts = {
        "images": 0 if texts else len(read),
        "captions": captions,
        "empty_captions": empty,
        "images_skipped": len(skipped),
    }
    return counts | {"skipped": skipped}


def build_captions(found):
    """Give every caption the row of its image.

    Args:
        found: {readable image file: its records}, in row order.
    Returns: (captions, how many were empty and left out); pictures alone have none.
    """
    captions, empty = [], 0
    for row, records in enumerate(found.values()):
        for record in records if "caption" in records[0] else ():
            if record["caption"].strip():
                captions.append({**record, "clip_embedding": row})
            else:
                empty += 1
    return captions, empty


def is_done(out, info):
    """Tell whether the store exists and was made of the same things, with nothing skipped."""
    if not (Path(out).is_file() and info_path(out).is_file()):
        return False
    stored = read_json(info_path(out))
    made_of = ("clip_model_type", "dtype", "annotations_sha256", "split", "made_of")
    same = known_encoder(stored) == known_encoder(info) and all(stored.get(key) == info[key] for key in made_of)
    return same and not stored.get("skipped")


def report_skipped(skipped):
    """List the first skipped images."""
    for name, reason in list(skipped.items())[:SHOWN]:
        note(f"skipped {name}: {reason}")
    if len(skipped) > SHOWN:
        note(f"... and {len(skipped) - SHOWN:,} more; the json beside the store lists them all")


def check(annotations, split, images, num_workers):
    """Print every bad record as `place<TAB>file<TAB>reason`; returns 2 where there is one."""
    faults, records, found = find_faults(annotations, split, images, num_workers)
    for fault in faults:
        print("\t".join(fault))
    note(f"{annotations}: {records:,} records of {found:,} images; {len(faults):,} faults")
    return 2 if faults else 0


def main(argv=None):
    """Extract the features of one split."""
    args = get_parser().parse_args(argv)
    set_max_pixels(args.max_pixels)
    fill_inputs(args)
    if args.check:
        return check(args.annotations, args.split, args.images, args.num_workers)
    split = "images" if args.no_captions else f"{args.split}_text" if args.text_only else args.split
    out = args.out or default_out(args.clip_model_type, split)
    inputs = {"the annotations": args.annotations, "the encoder": args.clip_model_type, "the images": args.images}
    check_store_output(out, inputs)
    found, skipped = gather(args)
    prepare_readers(0 if args.text_only else len(found), args.num_workers)
    device = own_device([pick_device(args.device)])
    with connected(device), lock_store(out) if is_main() else contextlib.nullcontext():
        with main_first():
            encoder = load_encoder(args.clip_model_type, device, args.dtype)
        if args.text_only:
            encoder = TextEncoder(encoder)
        return make_store(encoder, found, out, args, skipped)


def make_store(encoder, found, out, args, skipped):
    """Encode the images and write the store, unless it is there; arguments as those of `write_folder`."""
    folder = is_folder(out)
    info = {
        **encoder.describe(), "normalized": False, "annotations": args.annotations,
        "annotations_sha256": args.annotations and sha256(args.annotations), "split": args.split,
        "images_found": 0 if args.text_only else len(found), "modality": "text" if args.text_only else "image",
        "made_of": stamp_of(encoder, found),
        "versions": {"clipcap": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    if args.text_only:
        cut = encoder.count_cut(found)
        info["texts_cut"] = cut
        if cut:
            note(f"warning: {cut:,} of {len(found):,} captions are longer than the text tower reads, and are cut")
    if not skipped and not folder and is_done(out, info):
        what = "captions" if args.text_only else "images"
        note(f"{out} is complete: {len(found):,} {what} of {args.annotations or 'no annotations'}; nothing to do")
        return 0
    if folder:
        Path(out).mkdir(parents=True, exist_ok=True)
    try:
        done = (write_folder if folder else write_pickle)(encoder, found, out, args, info, skipped)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    report_skipped(done["skipped"])
    empty = f"{done['empty_captions']:,} empty captions left out, " if done["empty_captions"] else ""
    images = "" if args.text_only else f"{done['images']:,} images, "
    what = "records" if args.text_only else "images"
    note(f"{out}: {images}{done['captions']:,} captions, {empty}{done['images_skipped']:,} {what} skipped")
    return 0


if __name__ == "__main__":
    run(main)
