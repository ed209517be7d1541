"""Extract CLIP features: images + annotations -> feature store.

    python parse_coco.py --clip_model_type ViT-B/32

reads data/coco/annotations/train_caption.json and the images of data/coco/train2014 and val2014, and writes
data/coco/oscar_split_ViT-B_32_train.pkl. Each image is encoded once, however many captions it has. After a kill, the
same command resumes; images that are missing or cannot be read are listed and left out. With --out DIR/ the store is a
folder of shards in clip-retrieval's layout, which train.py memory-maps instead of loading. --check lists every bad
record without encoding.

    python parse_coco.py --clip_model_type ViT-B/32 --images photos/ --no_captions --out data/photos.pkl

makes a store of all pictures in these folders, without captions, for train_scst.py --reward clip. With --text_only the
captions alone are embedded, by the encoder's text tower, for train.py --noise_angle.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import os
import re
from pathlib import Path

from encoders import FORMS, check_encoder, published, split_path
from encoders.names import PATCHES, POOLED
from features.annotations import FORMATS
from features.check import find_faults, find_tar_faults
from features.images import set_max_pixels
from features.inputs import ANNOTATIONS, fill_inputs, gather, tar_source
from features.store_files import check_store_output
from utils.cli import Parser, late_imports, non_negative_int, note, positive_int, run
from utils.flags import add_dtype_flag, add_max_pixels_flag


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--annotations", metavar="F", help=f"{FORMATS} (default: {ANNOTATIONS})")
    data.add_argument(
        "--images", nargs="+", metavar="DIR",
        help="folders of images, searched in this order (default: data/coco/train2014 and val2014); or tars of "
        "img2dataset's kind, a folder of them, \"DIR/{00000..00999}.tar\", several joined by ::",
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
    add_encoder_flags(parser)
    return parser


def add_encoder_flags(parser):
    """Add the flags that say which encoder embeds pictures, and how."""
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--clip_model_type", default="ViT-B/32", metavar="NAME", help=f"{FORMS} (default: %(default)s)"
    )
    encoder.add_argument(
        "--list_encoders", nargs="?", const="", metavar="WORD",
        help="print published encoders whose name holds WORD: name, width, tokens, resolution, whether it reads texts",
    )  # fmt: skip
    encoder.add_argument(
        "--tokens", choices=(POOLED, PATCHES),
        help="one vector an image, or all K patch or query tokens of the last layer, before pooling, for train.py's "
        "networks on tokens (default: pooled; patches where the encoder has nothing else)",
    )  # fmt: skip
    encoder.add_argument("--batch_size", type=positive_int, default=64, help="images per call of the encoder")
    encoder.add_argument(
        "--num_workers", type=non_negative_int, default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)",
    )  # fmt: skip
    add_max_pixels_flag(encoder)
    encoder.add_argument("--device", help="torch device (default: a GPU if there is one)")
    add_dtype_flag(encoder)


def model_in_names(clip_model_type, tokens=None):
    """Return the encoder's part of a store's default name, as the predecessors write it, with a mark for tokens."""
    before, path = split_path(clip_model_type)
    model = re.sub("[/:]", "_", before + Path(path).stem if path and Path(path).exists() else clip_model_type)
    return model + f"_{PATCHES}" * (tokens == PATCHES)


def default_out(clip_model_type, split, tokens=None):
    """Return the default store name for a model and split: the predecessors', with a mark for tokens."""
    return f"data/coco/oscar_split_{model_in_names(clip_model_type, tokens)}_{split}.pkl"


def list_encoders(word):
    """Print the published encoders whose name contains `word`; returns 0.

    Raises: ValueError where there is none.
    """
    row = "{:<62} {:>6} {:>13} {:>6}  {}"
    print(row.format("--clip_model_type", "pooled", "patches", "pixels", "texts"))
    with late_imports():
        found = list(published(word))
    for one in found:
        tokens = f"{one.tokens} x {one.token_width}" if one.tokens else "-"
        print(row.format(one.name, one.width or "-", tokens, one.resolution, "yes" if one.has_texts else "no"))
    if not found:
        raise ValueError(f"--list_encoders {word}: no name holds it")
    return 0


def check(args):
    """Print every bad record as `place<TAB>file<TAB>reason`; returns 2 where there is one."""
    tars = tar_source(args)
    if tars:
        faults, records, found = find_tar_faults(tars, args.num_workers)
    else:
        faults, records, found = find_faults(args.annotations, args.split, args.images, args.num_workers)
    for fault in faults:
        print("\t".join(fault))
    checked = args.annotations or f"{len(tars.paths):,} tars"
    note(f"{checked}: {records:,} records of {found:,} images; {len(faults):,} faults")
    return 2 if faults else 0


def main(argv=None):
    """Extract the features of one split."""
    args = get_parser().parse_args(argv)
    if args.list_encoders is not None:
        return list_encoders(args.list_encoders)
    set_max_pixels(args.max_pixels)
    fill_inputs(args)
    if args.check:
        return check(args)
    split = "images" if args.no_captions else f"{args.split}_text" if args.text_only else args.split
    out = args.out or default_out(args.clip_model_type, split, args.tokens)
    encoder_file = split_path(args.clip_model_type)[1]
    inputs = {"the annotations": args.annotations, "the encoder": encoder_file, "the images": args.images}
    check_store_output(out, inputs)
    check_encoder(args.clip_model_type)
    source = gather(args)
    with late_imports():
        from features.extraction import extract
    return extract(args, source, out)


if __name__ == "__main__":
    run(main)
