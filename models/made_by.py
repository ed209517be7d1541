"""What captions were made by, kept beside them, so that those of two captioners are never mixed."""

import os
from dataclasses import asdict

from models.captioner import captioner_files
from models.pretrained import ALIASES, PRETRAINED, checkpoint_file
from utils.files import sha256


def made_by(args, decoding):
    """Return what decides the captions: the captioner, by its files' content, and how it decodes.

    Args:
        args: of the command line, with the flags of `predict.add_captioner_flags`.
        decoding: DecodingConfig.
    """
    name = ALIASES.get(args.checkpoint, args.checkpoint)
    if name not in PRETRAINED:
        checkpoint_file(name)  # so that a captioner of the hub is here by now
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    digests = sorted({sha256(file) for file in files if os.path.isfile(file)})
    # of what is no file, as the published captioners and names of the hub, no more is known
    names = {"checkpoint": name} if name in PRETRAINED else {}  # whatever lies in a folder of that name
    named = {flag: getattr(args, flag) for flag in ("clip_model_type", "language_model")}
    names |= {flag: name for flag, name in named.items() if name and not os.path.exists(name)}
    settings = {"dtype": args.dtype, "normalize_prefix": args.normalize_prefix}
    return {"files": digests, "names": names, "settings": settings, "decoding": asdict(decoding)}


def difference(earlier, made):
    """Say in what the captioner of earlier captions differs, or return None where it does not.

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
