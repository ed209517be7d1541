"""The files of a feature store: their names, checks before writing, and locks; no store is read here."""

import contextlib
from pathlib import Path

from utils.files import read_json
from utils.outputs import STORE, belongs_to, check_folder, check_output, lock, overwritten

PICKLES = (".pkl", ".pickle")
SHARDS = 64  # that a store is cut into, so that many processes have work, as far as the next limits allow
MIN_ROWS, MAX_ROWS = 1 << 10, 1 << 17  # images of a shard
STAMP = b"clipcap"  # key of the parquet's metadata: what the shard was made from


def is_folder(path):
    """Tell whether a store of this name is a folder of shards."""
    return str(path).endswith("/") or Path(path).is_dir()


def info_path(path):
    """Return the json beside a store: `x.pkl` -> `x.json`, `x/` -> `x.json`."""
    file = Path(path)
    return file.with_name(file.name + ".json") if is_folder(path) else file.with_suffix(".json")


def check_there(path):
    """Refuse the name of a store that does not exist; raises FileNotFoundError."""
    if not Path(path).is_dir() and not Path(path).is_file():
        raise FileNotFoundError(f"feature store {path} does not exist; make it with parse_coco.py, or check --data")


def foreign_shard(folder):
    """Return a folder's first parquet that `write_shard` did not write, or None; damaged ones are passed over."""
    for file in sorted(Path(folder).glob("metadata/*.parquet")):
        import pyarrow as pa  # slow to import, and most folders are empty
        import pyarrow.parquet as pq

        with contextlib.suppress(pa.ArrowException, OSError):
            if STAMP not in (pq.read_schema(file).metadata or {}):
                return file
    return None


def check_store_output(path, inputs):
    """Refuse a name for a new store that cannot be written, or where it or its json would overwrite another file.

    Args:
        path: of the store, as --out.
        inputs: see `check_output`; folders too.
    Raises: ValueError.
    """
    if is_folder(path):
        check_folder("--out", path)
        foreign = foreign_shard(path)
        if foreign:
            raise ValueError(f"--out {path} holds shards that are not of parse_coco.py, {foreign}; name another folder")
    else:
        check_output("--out", path, inputs, PICKLES)
    info = info_path(path)
    for output, how in ((path, ""), (info, ", by its json")):
        taken = overwritten([output], inputs)
        if taken:
            raise ValueError(f"--out {path} would overwrite {taken}{how}; name another store")
    if info.exists() and belongs_to(info) != STORE:
        raise ValueError(f"--out {path} would overwrite {info}, which tells of no store, by its json; name another")
    if info.exists() and ("shards" in read_json(info)) != is_folder(path):
        other = "a folder of shards" if "shards" in read_json(info) else "a pickle"
        raise ValueError(f"--out {path} would overwrite {info}, which tells of {other} of that name; name another")


@contextlib.contextmanager
def lock_store(out):
    """Lock a store and the json beside it, whose name two stores may share, while the body runs."""
    with lock(out), lock(info_path(out), shown=out):
        yield


def shard_rows(images):
    """Return how many images a shard holds; a power of two, so that a few more images leave the first shards alone."""
    rows = MIN_ROWS
    while rows < MAX_ROWS and rows * SHARDS < images:
        rows *= 2
    return rows
