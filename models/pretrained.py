"""The published captioners, by name: fetched once into a cache folder, or read from where the user put them."""

import os
from dataclasses import dataclass
from pathlib import Path

from utils.cli import nearest, note, shows_progress
from utils.files import atomic_path, reason, sha256


@dataclass(frozen=True)
class Pretrained:
    """A published checkpoint.

    Args:
        drive_id: its id on Google Drive.
        file_name: its name in the cache folder.
        clip_model_type: the encoder it was trained on.
        normalize_prefix: whether its embeddings were normalised.
    """

    drive_id: str
    file_name: str
    clip_model_type: str
    normalize_prefix: bool = False


# Source: rmokady/CLIP_prefix_caption, README and notebooks
PRETRAINED = {
    "coco": Pretrained("1IdaBtMSvtyzF0ByVaBHtvM0JYSXRExRX", "coco_weights.pt", "ViT-B/32"),
    "conceptual": Pretrained("14pXWwB4Zm82rsDdvbGguLfx9F8aM7ovT", "conceptual_weights.pt", "ViT-B/32"),
    "coco-transformer": Pretrained(
        "1GYPToCqFREwi285wPLhuVExlz7DDUDfJ", "coco_transformer_weights.pt", "RN50x4", normalize_prefix=True
    ),
}
ALIASES = {"conceptual-captions": "conceptual"}  # as the predecessor's Predictor calls it
DEMO = "demo"
NAMES = (*PRETRAINED, DEMO)  # what --checkpoint takes besides files
DEMO_CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "weights" / "demo_latest.pt"


def check_name(checkpoint):
    """Refuse what is neither a file nor a name; raises FileNotFoundError."""
    known = ALIASES.get(checkpoint, checkpoint) in NAMES
    if not known and not Path(checkpoint).exists() and os.sep not in str(checkpoint) and "." not in str(checkpoint):
        raise FileNotFoundError(
            f"--checkpoint {checkpoint} is neither a file nor one of {', '.join(NAMES)}{nearest(checkpoint, NAMES)}"
        )


def cache_folder():
    """Return the folder of fetched weights: $CLIPCAP_CACHE, or clipcap/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("CLIPCAP_CACHE") or Path(home) / "clipcap")


def fetch(name):
    """Return the file of a published checkpoint, fetching it where it is not in the cache yet.

    Args:
        name: key of PRETRAINED.
    Raises: FileNotFoundError naming the file to fetch by hand and where to put it.
    """
    pretrained = PRETRAINED[name]
    path = cache_folder() / pretrained.file_name
    if path.is_file():
        return path
    note(f"fetching the {name} captioner into {path}")
    try:
        import gdown

        with atomic_path(path) as temporary:
            if gdown.download(id=pretrained.drive_id, output=str(temporary), quiet=not shows_progress()) is None:
                raise OSError("the download was refused")
    except Exception as error:  # gdown raises errors of its own, of requests and of the system
        raise FileNotFoundError(
            f"the {name} captioner could not be fetched ({reason(error)}): download "
            f"https://drive.google.com/uc?id={pretrained.drive_id} elsewhere and put it here as {path}"
        ) from None
    note(f"{path}: sha256 {sha256(path)}")
    return path
