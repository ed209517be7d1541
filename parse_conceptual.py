"""Extract CLIP features of Conceptual Captions: tables of captions and addresses -> pictures -> feature store.

    python parse_conceptual.py --data_root ./data/conceptual --clip_model_type ViT-B/32

reads Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv of --data_root, as Google gives them (a caption and
an address per line, in either order), downloads the pictures into train/ and val/ by line number, and encodes them
while it downloads. Writes conceptual_clip_ViT-B_32_train.pkl and _val.pkl there, or shards with --out DIR/. Killed and
run again, it goes on to the address; what is dead is counted by reason in {split}_downloads.json.

    python parse_conceptual.py --tars "cc3m/{00000..00331}.tar"

takes the train split from tars of img2dataset's kind instead, and downloads nothing. Captions get the full stop that
the predecessor gave them.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
from pathlib import Path

from encoders import load_encoder, split_path
from features.addresses import Table, add_period
from features.downloads import DownloadedPictures, Downloads
from features.extraction import Reading, make_store
from features.fetching import USER_AGENT, Fetcher
from features.images import set_max_pixels
from features.loader import prepare_readers
from features.sources import Tars
from features.store import check_store_output, is_folder, lock_store
from features.tars import expand_tars
from parse_coco import add_encoder_flags, model_in_names
from utils.cli import Parser, note, positive_float, positive_int, run
from utils.devices import pick_device
from utils.distributed import connected, is_main, main_first, own_device
from utils.files import write_json
from utils.outputs import lock
from utils.precision import pick_dtype

TABLES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}


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
    downloads.add_argument("--user_agent", default=USER_AGENT, help="who asks (default: this program's name)")
    add_encoder_flags(parser)
    return parser


class Punctuated(Tars):
    """Tars whose captions get the predecessor's full stop."""

    def parts(self):
        """See Source."""
        return [_Punctuated(part) for part in super().parts()]


class _Punctuated:
    """A part of Tars with the full stops."""

    def __init__(self, part):
        self.part, self.count = part, part.count
        self.has_readable = part.has_readable

    def made_of(self):
        return [*self.part.made_of(), "add_period"]

    def read(self):
        pictures, skipped = self.part.read()
        for records in pictures.values():
            for record in records:
                record["caption"] = add_period(record["caption"])
        return pictures, skipped


def pick_splits(args):
    """Return the splits to make.

    Raises: ValueError, FileNotFoundError where they are not to be had.
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


def extract_tars(args, encoder, split, out, reading):
    """Make the store of tars; returns the exit status."""
    info = {"annotations": None, "annotations_sha256": None, "split": split}
    return make_store(encoder, Punctuated(expand_tars(args.tars)), out, reading, info)


def extract_table(args, encoder, split, out, reading):
    """Make the store of a table, downloading; returns the exit status.

    Raises: ValueError where no address gave a picture; as `Downloads` and `make_store`.
    """
    root = Path(args.data_root)
    table = Table(root / TABLES[split])
    fetcher = Fetcher(args.timeout, args.per_host, args.allow_private, args.user_agent)
    info = {"annotations": table.path, "annotations_sha256": table.sha256, "split": split}
    folder, journals = root / split, root / f"{split}_downloads"
    with Downloads(table, folder, journals, fetcher, args.num_threads, args.per_host) as downloads:
        downloads.start(args.retry)
        try:
            status = make_store(encoder, DownloadedPictures(downloads), out, reading, info)
        except ValueError:
            if downloads.open or downloads.statistics()["fetched"]:
                raise
            told = downloads.statistics()
            raise ValueError(
                f"{table.path}: none of {told['addresses']:,} addresses gave a picture: {_reasons(told)}"
            ) from None
        told = downloads.statistics()
    if is_main():
        write_json(root / f"{split}_downloads.json", told)
        note(
            f"{table.path}: {told['fetched']:,} of {told['addresses']:,} addresses fetched, {told['bytes'] / 1e6:,.1f} "
            f"MB, {told['addresses_per_s']:,} addresses/s; dead: {_reasons(told) or 'none'}"
        )
    return status


def _reasons(told):
    """Return the reasons of dead addresses in a line, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in list(told["dead_by_reason"].items())[:8])


def main(argv=None):
    """Download and extract what the command line asks for."""
    args = get_parser().parse_args(argv)
    set_max_pixels(args.max_pixels)
    splits, root = pick_splits(args), Path(args.data_root)
    stores = {split: store_of(args, split) for split in splits}
    for split, out in stores.items():
        check_store_output(out, {"the table": root / TABLES[split], "the encoder": split_path(args.clip_model_type)[1]})
    prepare_readers(None, args.num_workers)
    device = own_device([pick_device(args.device)])
    pick_dtype(args.dtype, device)
    with connected(device), contextlib.ExitStack() as held:
        if is_main():
            for split, out in stores.items():
                held.enter_context(lock_store(out))
                if not args.tars:
                    held.enter_context(lock(root / split, flag="--data_root"))
        with main_first():
            encoder = load_encoder(args.clip_model_type, device, args.dtype, args.tokens)
        reading, status = Reading(args.batch_size, args.num_workers), 0
        for split, out in stores.items():
            status |= (extract_tars if args.tars else extract_table)(args, encoder, split, out, reading)
    return status


if __name__ == "__main__":
    run(main)
