"""A record of which captioner made a folder's captions, so that those of two captioners are never mixed."""

import os
from dataclasses import asdict
from pathlib import Path

from models.captioner_files import captioner_files
from models.pretrained import ALIASES, PRETRAINED, checkpoint_file
from utils.files import read_json, sha256
from utils.outputs import check_folder

MADE_BY = "_made_by.json"  # readers of parquet folders skip names that start with _


def made_by(args, decoding):
    """Return what determines the captions: the captioner, by its files' content, and how it decodes.

    Args:
        args: of the command line, with the flags of `predict.add_captioner_flags`.
        decoding: DecodingConfig.
    """
    name = ALIASES.get(args.checkpoint, args.checkpoint)
    if name not in PRETRAINED:
        checkpoint_file(name)  # fetches a captioner of the hub, so that its files can be hashed
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    digests = sorted({sha256(file) for file in files if os.path.isfile(file)})
    # published captioners and models of the hub have no files to hash, so their names are compared
    names = {"checkpoint": name} if name in PRETRAINED else {}  # even where a folder has that name
    named = {flag: getattr(args, flag) for flag in ("clip_model_type", "language_model")}
    names |= {flag: name for flag, name in named.items() if name and not os.path.exists(name)}
    settings = {"dtype": args.dtype, "normalize_prefix": args.normalize_prefix}
    return {"files": digests, "names": names, "settings": settings, "decoding": asdict(decoding)}


def difference(earlier, made):
    """Say how the captioner of earlier captions differs from the present one, or return None.

    Args:
        earlier, made: as `made_by` returns them, then and now.
    """
    if earlier == made:
        return None
    parts = {part: earlier.get(part) for part in made} if isinstance(earlier, dict) else {}
    if not all(parts.get(part) == made[part] for part in ("files", "names")):
        return "captioner"
    flags = [flag for part in ("settings", "decoding") for flag, value in made[part].items()
             if (parts[part] or {}).get(flag) != value]  # fmt: skip
    return f"way of decoding ({', '.join(flags)})"


def is_bulk(out):
    """Tell whether --out names a folder of captions."""
    return bool(out) and (str(out).endswith(os.sep) or os.path.isdir(out))


def check_bulk(folder, made):
    """Refuse a folder of captions that cannot be written, or holds captions of another captioner, or other files.

    Args:
        folder: to write, which need not exist.
        made: as `made_by` returns it.
    Raises: ValueError.
    """
    check_folder("--out", folder)
    beside = Path(folder) / MADE_BY
    files = sorted(Path(folder).rglob("*.parquet"))
    if not files:
        return
    if not beside.is_file():
        raise ValueError(f"--out {folder} holds parquet files that are not of predict.py, {files[0]}; name another")
    other = difference(read_json(beside).get("made_by"), made)
    if other:
        raise ValueError(
            f"--out {folder} holds captions of another {other}: give the same flags to resume, or name another --out"
        )
