"""Conceptual Captions -> feature stores: what parse_conceptual.py does once its command line is right."""

import contextlib
from pathlib import Path

from encoders import load_encoder
from features.addresses import TABLES, Table, add_period
from features.downloads import DownloadedPictures, Downloads
from features.extraction import Reading, make_store
from features.fetching import Fetcher
from features.loader import prepare_readers
from features.sources import Tars
from features.store_files import lock_store
from features.tars import expand_tars
from utils.cli import note
from utils.devices import pick_device
from utils.distributed import connected, main_first, own_device
from utils.files import write_json
from utils.outputs import lock
from utils.precision import pick_dtype
from utils.processes import is_main


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


def extract_tars(args, encoder, split, out, reading):
    """Make the store of tars; returns the exit status."""
    info = {"annotations": None, "annotations_sha256": None, "split": split}
    return make_store(encoder, Punctuated(expand_tars(args.tars)), out, reading, info)


def extract_table(args, encoder, split, out, reading):
    """Download a table's pictures and make their store; returns the exit status.

    Raises: ValueError where no address gave a picture; else as `Downloads` and `make_store`.
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
            statistics = downloads.statistics()
            raise ValueError(
                f"{table.path}: none of {statistics['addresses']:,} addresses gave a picture: {_reasons(statistics)}"
            ) from None
        statistics = downloads.statistics()
    if is_main():
        write_json(root / f"{split}_downloads.json", statistics)
        note(
            f"{table.path}: {statistics['fetched']:,} of {statistics['addresses']:,} addresses fetched, "
            f"{statistics['bytes'] / 1e6:,.1f} MB, {statistics['addresses_per_s']:,} addresses/s; "
            f"dead: {_reasons(statistics) or 'none'}"
        )
    return status


def _reasons(statistics):
    """Return the reasons of dead addresses in a line, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in list(statistics["dead_by_reason"].items())[:8])


def extract_splits(args, stores):
    """Download and extract splits.

    Args:
        args: the command line of parse_conceptual.py.
        stores: {split: store to write}.
    Returns: the exit status.
    """
    prepare_readers(None, args.num_workers)
    device = own_device([pick_device(args.device)])
    pick_dtype(args.dtype, device)
    with connected(device), contextlib.ExitStack() as held:
        if is_main():
            for split, out in stores.items():
                held.enter_context(lock_store(out))
                if not args.tars:
                    held.enter_context(lock(Path(args.data_root) / split, flag="--data_root"))
        with main_first():
            encoder = load_encoder(args.clip_model_type, device, args.dtype, args.tokens)
        reading, status = Reading(args.batch_size, args.num_workers), 0
        for split, out in stores.items():
            status |= (extract_tars if args.tars else extract_table)(args, encoder, split, out, reading)
    return status
