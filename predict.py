"""Caption images: files, folders, globs or tars -> captions.

    python predict.py photo.jpg
    python predict.py photos/ --checkpoint coco_train/coco_prefix_latest.pt --use_beam_search --out captions.json

prints `path<TAB>caption` per image. A checkpoint that train.py wrote needs no other flag; a predecessor's bare .pt is
recognised from its keys and shapes. `class Predictor` is the same for other code.

    torchrun --standalone --nproc_per_node 8 predict.py "cc12m/{00000..00999}.tar" --out captions/

writes a parquet file per tar, and goes on where it was stopped; --data STORE captions a store's embeddings.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from features.extraction import Reading
from features.images import add_max_pixels_flag, set_max_pixels
from features.listing import as_line, find_images
from features.loader import prepare_readers
from features.results import is_table, name_shared, record, shared_ids, write_part, write_results
from features.sources import FoundPictures, Tars
from features.store import read_store
from features.tars import expand_tars, names_tars
from models.bulk import CaptionFolder, caption_parts, caption_store, is_bulk
from models.captioner import Captioner, captioner_files, stored_decoding
from models.decoding import BEAM, CLIP, DECODERS, GREEDY, NO_RERANK, RERANKS, SAMPLE, DecodingConfig
from models.made_by import made_by
from models.predictor import Predictor as Predictor  # other code finds it here
from models.pretrained import NAMES
from training.validation import check_encoders
from utils.cli import (
    Parser,
    non_negative_int,
    note,
    positive_float,
    positive_int,
    progress_bar,
    run,
)  # fmt: skip
from utils.devices import add_device_flags, pick_devices
from utils.distributed import connected, is_main, own_device, world_size
from utils.outputs import check_output, lock
from utils.precision import add_dtype_flag

BATCH = 32  # images at a time, unless --batch_size says


def get_parser(decoding=None):
    """Return the command line's parser; `decoding` is the DecodingConfig of a variant of this command."""
    parser = Parser(__doc__)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE",
        help="image file, folder, or quoted glob; or tars of img2dataset's kind, a folder of them, "
        "\"DIR/{00000..00999}.tar\", several joined by ::",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="STORE", help="caption a feature store's embeddings instead; needs --out DIR/"
    )
    parser.add_argument(
        "--out", metavar="FILE",
        help="also write [{image_id, caption}], COCO's result format, or the same as .csv; DIR/: write nothing but "
        "parquet files of key, caption, logprob and error there, one per tar or shard, and go on with those",
    )  # fmt: skip
    add_captioner_flags(parser, decoding or DecodingConfig())
    parser.set_defaults(batch_size=None)
    return parser


def add_captioner_flags(parser, decoding):
    """Add what every captioning command takes: captioner, decoding, batches, devices.

    Args:
        decoding: DecodingConfig, where the checkpoint's json does not say.
    """
    model = parser.add_argument_group("captioner")
    model.add_argument(
        "--checkpoint", default="coco",
        help=f"{', '.join(NAMES)}, a file, or ORG/NAME[@REVISION] of the Hugging Face Hub (default: coco)",
    )  # fmt: skip
    model.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    model.add_argument("--language_model", help="its folder or name, where the checkpoint does not say or it has moved")
    model.add_argument(
        "--normalize_prefix", action="store_true", default=None, help="for a bare checkpoint trained with it"
    )
    add_decoding_flags(parser, decoding)
    batches = parser.add_argument_group("batches")
    batches.add_argument("--batch_size", type=positive_int, default=32, help="images at a time (default: 32)")
    batches.add_argument(
        "--num_workers", type=non_negative_int, default=min(4, os.cpu_count() or 1), help="processes that read images"
    )
    add_max_pixels_flag(batches)
    add_device_flags(parser)
    add_dtype_flag(batches)


def add_decoding_flags(parser, decoding):
    """Add the flags of decoding, which have no value where they are not given.

    Args:
        decoding: DecodingConfig of the command, where the checkpoint's json does not say.
    """
    parser.set_defaults(decoding=decoding)
    how = {GREEDY: "greedy", BEAM: "beam search", SAMPLE: "sampling"}[decoding.method]
    group = parser.add_argument_group(
        "decoding", f"as the checkpoint's json says; where it does not, {how} with the defaults below"
    )

    def add(name, text, **options):
        default = repr(getattr(decoding, name)).replace("%", "%%")
        group.add_argument(f"--{name}", help=f"{text} (default: {default})", **options)

    group.add_argument("--use_beam_search", action="store_true", default=None, help="beam search")
    add("beam_size", "beams", type=positive_int)
    add(
        "length_penalty", "exponent of the length in a beam's mean log-probability; above 1 favours long captions",
        type=float,
    )  # fmt: skip
    group.add_argument("--top_p", type=positive_float, help="sample from this much of the probability")
    add("temperature", "of sampling", type=positive_float)
    add("num_captions", "captions per image", type=positive_int)
    add("seed", "of sampling", type=non_negative_int)
    add("entry_length", "tokens at most", type=positive_int)
    add("prompt", "text that captions go on from")
    add("decoder", "whose search: ours or the library's", choices=DECODERS)
    add("stop_token", "text that ends a caption")
    add(
        "rerank", "choose among candidates (samples, or beams), by CLIP's text tower or by what most of them agree on",
        choices=RERANKS,
    )  # fmt: skip
    add("num_candidates", "candidates per image to choose among", type=positive_int)


def decoding_config(args):
    """Return the DecodingConfig asked for: by flags, else by the checkpoint's json, else by the command.

    Raises: ValueError for flags that contradict each other, or a json that is malformed.
    """
    if args.use_beam_search and args.top_p is not None:
        raise ValueError("--use_beam_search and --top_p contradict each other: beam search does not sample")
    base = stored_decoding(args.checkpoint) or args.decoding
    given = {field.name: getattr(args, field.name, None) for field in fields(DecodingConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.use_beam_search:
        given["method"] = BEAM
    elif args.top_p is not None or (base.method == GREEDY and given.get("temperature", 1) != 1):
        given = {"method": SAMPLE, "top_p": 1.0} | given
    decoding = replace(base, **given)
    if decoding.rerank == NO_RERANK and "num_candidates" in given:
        raise ValueError(f"--num_candidates {args.num_candidates} needs --rerank clip or mbr, which chooses among them")
    return decoding


def check_out(args, paths, num_captions):
    """Refuse an --out that cannot be written, cannot hold the captions or is one of the inputs; raises ValueError."""
    if is_table(args.out) and num_captions > 1:
        raise ValueError(
            f"--out {args.out} has room for one caption per image, not --num_captions {num_captions}: name a .json"
        )
    captioner = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    inputs = {"one of the images": paths if os.path.exists(args.out) else (), "the captioner": captioner}
    check_output("--out", args.out, inputs, (".json", ".csv") if Path(args.out).suffix else ())


def captioner_of(args, with_encoder=True):
    """Return the Captioner that the command line asks for; `with_encoder` as its own."""
    return Captioner(
        args.checkpoint, args.clip_model_type, args.language_model, args.normalize_prefix, args.device, args.pn,
        args.dtype, args.offload_dir, args.max_memory, with_encoder,
    )  # fmt: skip


def find_pictures(arguments):
    """Return (what is to be captioned: files, or pictures in tars; {name: why one in a tar is left out})."""
    if not any(map(names_tars, arguments)):
        return find_images(arguments), {}
    pictures, left_out = Tars(expand_tars(arguments), False).read()
    return list(pictures), left_out


def caption_in_bulk(args, decoding):
    """Caption into a folder of parquet files, in one process or several; returns the exit status."""
    if not args.out or not is_bulk(args.out):
        raise ValueError("--data needs --out DIR/, a folder, which a parquet file per shard is written into")
    store, source = None, None
    if args.data:
        store = read_store(args.data)
        if store.is_of_texts:
            raise ValueError(f"--data {args.data} holds embeddings of texts; name a store of images")
    elif any(map(names_tars, args.images)):
        source = Tars(expand_tars(args.images), False)
    else:
        found = {path: [] for path in find_images(args.images)}
        source = FoundPictures(found, {}, " ".join(args.images))
    workers = args.num_workers if source and (source.count or sys.maxsize) > (args.batch_size or BATCH) else 0
    prepare_readers(source.count if source else 0, workers)
    device = own_device(pick_devices(args.device))
    if world_size() > 1:
        args.device = str(device)
    folder = CaptionFolder(args.out, made_by(args, decoding))
    with connected(device), lock(args.out) if is_main() else contextlib.nullcontext():
        captioner = captioner_of(args, with_encoder=not store or decoding.rerank == CLIP)
        try:
            if store:
                own = captioner.model.config.shape, captioner.described
                check_encoders(f"--data {store.path}", store, f"--checkpoint {args.checkpoint}", *own)
                return caption_store(captioner, store, folder, decoding, args.batch_size)
            reading = Reading(args.batch_size or BATCH, workers)
            return caption_parts(captioner, source.parts(), folder, decoding, reading)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here") from None


def caption_all(captioner, paths, decoding, batch_size, num_workers, results):
    """Caption files, printing each as it is done.

    Args:
        results: {path: result in COCO's format} that each image is added to.
    Returns: {path: why it could not be read}.
    """
    unreadable = {}
    with progress_bar(len(paths), "images", "img") as bar:
        for captions, errors in captioner.caption_files(paths, decoding, batch_size, num_workers):
            results |= {path: record(path, group) for path, group in captions.items()}  # kept if printing fails
            for path, group in captions.items():
                for caption in group:
                    bar.write(f"{as_line(path)}\t{' '.join(caption.text.split())}")
            sys.stdout.flush()  # a pipe's reader waits for whole batches only
            for path, reason in errors.items():
                note(f"skipped {as_line(path)}: {reason}")
            unreadable |= errors
            bar.update(len(captions) + len(errors))
    return unreadable


@contextlib.contextmanager
def results_kept(args, paths, results):
    """Hold --out for the time of the body and write the results then, also those of a run that is stopped.

    Raises: what the body raises; KeyboardInterrupt says how many images are captioned.
    """
    shared = shared_ids(paths) if args.out else {}
    if shared:
        number = sum(map(len, shared.values()))
        note(
            f"warning: {number:,} images share an image_id with another ({name_shared(shared)}), of which evaluate.py "
            "takes one caption each; rename the files"
        )
    with lock(args.out) if args.out else contextlib.nullcontext():
        try:
            yield
            if results and args.out:
                write_results(args.out, results, shared)
        except (KeyboardInterrupt, Exception) as stop:
            said = f"{len(results)} of {len(paths)} images are captioned"
            if results and args.out:
                said += f", in {write_part(args.out, results, shared)}"
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(said) from None
            if results:
                note(f"warning: {said}")
            raise


def main(argv=None, parser=None):
    """Caption what the command line names; returns 2 where an image could not be read.

    `parser` is that of a variant of this command.
    """
    args = (parser or get_parser()).parse_args(argv)
    set_max_pixels(args.max_pixels)
    if bool(args.images) == bool(args.data):
        raise ValueError("name images, or a store by --data STORE, and not both")
    decoding = decoding_config(args)
    if args.data or is_bulk(args.out):
        return caption_in_bulk(args, decoding)
    if world_size() > 1:
        raise ValueError("several processes share out parts of --out DIR/ alone; start one, or name a folder")
    paths, unreadable = find_pictures(args.images)
    if args.out:
        check_out(args, paths, decoding.num_captions)
    results, total, batch_size = {}, len(paths) + len(unreadable), args.batch_size or BATCH
    for name, reason in unreadable.items():
        note(f"skipped {as_line(name)}: {reason}")
    with results_kept(args, paths, results):
        workers = 0 if len(paths) <= batch_size else args.num_workers
        prepare_readers(len(paths), workers)
        captioner = captioner_of(args)
        unreadable |= caption_all(captioner, paths, decoding, batch_size, workers, results)
    if unreadable:
        others = "; the others are captioned" if results else ""
        note(f"error: {len(unreadable)} of {total} images could not be read{others}")
        return 2
    return 0


if __name__ == "__main__":
    run(main)
