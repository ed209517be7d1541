"""Extract CLIP features of Conceptual Captions: tables of captions and addresses -> pictures -> feature store.

    python parse_conceptual.py --data_root ./data/conceptual --clip_model_type ViT-B/32

reads Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv of --data_root, as Google gives them (a caption and
an address per line, in either order), downloads the pictures into train/ and val/ by line number, and encodes them
while it downloads. Writes conceptual_clip_ViT-B_32_train.pkl and _val.pkl there, or shards with --out DIR/. After a
kill, the same command resumes at the next address; dead ones are counted by reason in {split}_downloads.json.

    python parse_conceptual.py --tars "cc3m/{00000..00331}.tar"

takes the train split from tars of img2dataset's kind instead, and downloads nothing. Captions get the full stop that
the predecessor gave them.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

from pathlib import Path

from encoders import check_encoder, split_path
from features.addresses import TABLES, USER_AGENT
from features.images import set_max_pixels
from features.store_files import check_store_output, is_folder
from features.tars import expand_tars
from parse_coco import add_encoder_flags, list_encoders, model_in_names
from utils.cli import Parser, late_imports, positive_float, positive_int, run


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="./data/conceptual", help="folder of the tables, pictures and stores")
    data.add_argument(
        "--splits", nargs="+", choices=TABLES, metavar="SPLIT",
        help="train, val or both (default: those whose table is there; of --tars, train)",
    )  # fmt: skip
    data.add_argument(
        "--tars", nargs="+", metavar="TARS",
        help='tars of img2dataset\'s kind in the place of a table: "DIR/{00000..00331}.tar", or a folder of them',
    )  # fmt: skip
    data.add_argument(
        "--out", metavar="DIR/", help="write shards into DIR/train and DIR/val (default: a pickle in --data_root)"
    )
    downloads = parser.add_argument_group("downloads")
    downloads.add_argument("--num_threads", type=positive_int, default=16, help="addresses that are fetched at once")
    downloads.add_argument("--per_host", type=positive_int, default=4, help="of these, from one host")
    downloads.add_argument("--timeout", type=positive_float, default=10.0, help="seconds that a host may be silent")
    downloads.add_argument("--retry", action="store_true", help="ask again for addresses that may be there by now")
    downloads.add_argument(
        "--allow_private", action="store_true", help="fetch from this machine's own networks too, if an address says so"
    )
    downloads.add_argument("--user_agent", default=USER_AGENT, help="User-Agent header (default: this program's name)")
    add_encoder_flags(parser)
    return parser


def pick_splits(args):
    """Return the splits to make.

    Raises: ValueError for several splits of --tars; FileNotFoundError where a split's table does not exist.
    """
    root = Path(args.data_root)
    if args.tars:
        splits = args.splits or ["train"]
        if len(splits) > 1:
            raise ValueError("--tars are of one split: pass --splits train or --splits val")
        return splits
    there = [split for split in ("val", "train") if (root / TABLES[split]).is_file()]
    missing = [TABLES[split] for split in args.splits or () if split not in there]
    if missing or not there:
        names = " and ".join(missing or TABLES.values())
        raise FileNotFoundError(f"{root} has no {names}: put it there, or pass --data_root, or --tars for tars")
    return [split for split in there if split in (args.splits or there)]


def store_of(args, split):
    """Return the store of a split; raises ValueError for an --out that is no folder."""
    if not args.out:
        model = model_in_names(args.clip_model_type, args.tokens)
        return str(Path(args.data_root) / f"conceptual_clip_{model}_{split}.pkl")
    if not is_folder(args.out):
        raise ValueError(f"--out {args.out} is no folder; end it in / for shards, or leave it out for a pickle")
    return f"{Path(args.out) / split}/"


def main(argv=None):
    """Download and extract what the command line asks for."""
    args = get_parser().parse_args(argv)
    if args.list_encoders is not None:
        return list_encoders(args.list_encoders)
    set_max_pixels(args.max_pixels)
    splits, root = pick_splits(args), Path(args.data_root)
    stores = {split: store_of(args, split) for split in splits}
    for split, out in stores.items():
        check_store_output(out, {"the table": root / TABLES[split], "the encoder": split_path(args.clip_model_type)[1]})
    check_encoder(args.clip_model_type)
    if args.tars:
        expand_tars(args.tars)
    with late_imports():
        from features.conceptual import extract_splits
    return extract_splits(args, stores)


if __name__ == "__main__":
    run(main)
