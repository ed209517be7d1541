"""Caption images: files, folders, globs or tars -> captions.

    python predict.py photo.jpg
    python predict.py photos/ --checkpoint coco_train/coco_prefix_latest.pt --use_beam_search --out captions.json

prints `path<TAB>caption` per image. A checkpoint that train.py wrote needs no other flag; a predecessor's bare .pt is
recognised from its keys and shapes. `class Predictor` does the same for Python code.

    torchrun --standalone --nproc_per_node 8 predict.py "cc12m/{00000..00999}.tar" --out captions/

writes a parquet file per tar, and goes on where it was stopped; --data STORE captions a store's embeddings.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import os
from dataclasses import fields, replace
from pathlib import Path

from features.images import set_max_pixels
from features.listing import find_images
from features.results import is_table
from features.sources import FoundPictures, Tars
from features.store_files import check_there
from features.tars import expand_tars, names_tars
from models.captioner_files import captioner_files, check_captioner, stored_decoding
from models.made_by import check_bulk, is_bulk, made_by
from models.pretrained import DEMO, PRETRAINED
from models.settings import BEAM, DECODERS, GREEDY, NO_RERANK, RERANKS, SAMPLE, DecodingConfig
from utils.cli import Parser, late_imports, non_negative_int, positive_float, positive_int, run
from utils.flags import add_device_flags, add_dtype_flag, add_max_pixels_flag, check_offloading
from utils.outputs import check_output
from utils.processes import world_size

BATCH = 32  # images at a time, unless --batch_size is given


def __getattr__(name):
    """Import the classes that other code finds here only when asked for: they need torch."""
    if name == "Predictor":
        from models.predictor import Predictor

        return Predictor
    if name == "Captioner":
        from models.captioner import Captioner

        return Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        help="also write [{image_id, caption}], COCO's result format, or the same as .csv; DIR/: write only "
        "parquet files of key, caption, logprob and error, one per tar or shard, and go on after the finished ones",
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
        help=f"{', '.join(PRETRAINED)} (for photos; fetched once), {DEMO} (for synthetic scenes), a file, or "
        "ORG/NAME[@REVISION] of the Hugging Face Hub (default: coco)",
    )  # fmt: skip
    add_parts_flags(model)
    add_decoding_flags(parser, decoding)
    batches = parser.add_argument_group("batches")
    batches.add_argument("--batch_size", type=positive_int, default=32, help="images at a time (default: 32)")
    batches.add_argument(
        "--num_workers", type=non_negative_int, default=min(4, os.cpu_count() or 1), help="processes that read images"
    )
    add_max_pixels_flag(batches)
    add_device_flags(parser)
    add_dtype_flag(batches)


def add_parts_flags(parser):
    """Add what a bare checkpoint does not say of the captioner's parts."""
    parser.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    parser.add_argument(
        "--language_model", help="its folder or name, where the checkpoint does not say or it has moved"
    )
    parser.add_argument(
        "--normalize_prefix", action="store_true", default=None, help="for a bare checkpoint trained with it"
    )


def add_decoding_flags(parser, decoding):
    """Add the flags of decoding, which are None unless given.

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
    group.add_argument(
        "--top_p", type=positive_float, help="sample from the likeliest tokens that together have this probability"
    )
    add("temperature", "of sampling; below 1 keeps to the likely, above 1 varies more", type=positive_float)
    add("num_captions", "captions per image", type=positive_int)
    add("seed", "of sampling", type=non_negative_int)
    add("entry_length", "tokens at most", type=positive_int)
    add("prompt", "text that captions go on from")
    add("decoder", "whose search: ours or transformers'", choices=DECODERS)
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


def find_pictures(arguments):
    """Return (pictures to caption, as files or in tars; {name: why a picture in a tar is left out})."""
    if not any(map(names_tars, arguments)):
        return find_images(arguments), {}
    pictures, left_out = Tars(expand_tars(arguments), False).read()
    return list(pictures), left_out


def bulk_source(args, made):
    """Return the Source of pictures to caption into a folder, or None for a store.

    Args:
        made: what `made_by` returns.
    Raises: ValueError, FileNotFoundError where the input or the folder cannot be used.
    """
    if not args.out or not is_bulk(args.out):
        raise ValueError("--data needs --out DIR/, a folder, which a parquet file per shard is written into")
    check_bulk(args.out, made)
    if args.data:
        check_there(args.data)
        return None
    if any(map(names_tars, args.images)):
        return Tars(expand_tars(args.images), False)
    return FoundPictures({path: [] for path in find_images(args.images)}, {}, " ".join(args.images))


def main(argv=None, parser=None):
    """Caption what the command line names; returns 2 where an image could not be read.

    `parser` is that of a variant of this command.
    """
    args = (parser or get_parser()).parse_args(argv)
    set_max_pixels(args.max_pixels)
    if bool(args.images) == bool(args.data):
        raise ValueError("name images, or a store by --data STORE, and not both")
    decoding = decoding_config(args)
    check_offloading(args)
    batch_size = args.batch_size or BATCH
    if args.data or is_bulk(args.out):
        made = made_by(args, decoding)
        source = bulk_source(args, made)
        check_captioner(args.checkpoint, args.clip_model_type)
        with late_imports():
            from models.bulk import caption_in_bulk
        return caption_in_bulk(args, decoding, source, made, batch_size)
    if world_size() > 1:
        raise ValueError("several processes can only share the parts of --out DIR/; start one, or name a folder")
    paths, unreadable = find_pictures(args.images)
    if args.out:
        check_out(args, paths, decoding.num_captions)
    check_captioner(args.checkpoint, args.clip_model_type)
    with late_imports():
        from models.captioning import caption_pictures
    return caption_pictures(args, decoding, paths, unreadable, batch_size)


if __name__ == "__main__":
    run(main)
