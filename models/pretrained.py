"""What a captioner's name stands for: a published captioner, fetched once, a file, a folder, or one of the hub."""

import functools
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from utils.cli import nearest, note, shows_progress
from utils.files import atomic_path, read_json, reason, sha256
from utils.hub import FORM, PREFIX, fetch_commit, newest, parse_repository


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
NAMES = (*PRETRAINED, DEMO)  # what --checkpoint takes besides files and repositories of the hub
# a shared captioner's folder: these files, and its encoder where that has no public name
SHARED_CONFIG, SHARED_WEIGHTS, SHARED_TOKENIZER = "captioner.json", "captioner.safetensors", "captioner_tokenizer"
SHARED_ENCODER = "encoder"
BESIDE_WEIGHTS = [f"{SHARED_TOKENIZER}/*", f"{SHARED_ENCODER}.*", f"{SHARED_ENCODER}/*"]
WEIGHTS_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")  # such a name is a missing file, not a repository
DEMO_CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "weights" / "demo_latest.pt"


def checkpoint_file(name, flag="--checkpoint", with_weights=True):
    """Return the file of a captioner.

    Args:
        name: one of NAMES; a file; a folder that holds a shared captioner; a repository of the hub that does, with or
            without PREFIX. A file or folder wins over a repository of its name.
        flag: the option that names it, for the error.
        with_weights: False fetches only the json of a repository, not its weights.
    Raises: FileNotFoundError where there is no such thing, or it cannot be fetched; ValueError where the repository
        holds something else.
    """
    name = ALIASES.get(name, name)
    if name in PRETRAINED:
        return fetch(name)
    if name == DEMO:
        return DEMO_CHECKPOINT
    path = Path(name)
    if (path / SHARED_WEIGHTS).is_file():
        return path / SHARED_WEIGHTS
    named = repository_of(name)
    if named:
        try:
            return _of_the_hub(*named, with_weights)
        except FileNotFoundError as error:
            here = "" if str(name).startswith(PREFIX) else f"{name} is no file here, and "
            raise FileNotFoundError(f"{flag}: {here}{error}") from None
    if not path.exists() and os.sep not in str(name) and "." not in str(name):
        raise FileNotFoundError(
            f"{flag} {name} is neither a file, nor one of {', '.join(NAMES)}, nor {FORM}{nearest(name, NAMES)}"
        )
    return path


def repository_of(name):
    """Return (ORG/NAME, revision or None) of a captioner's name that is a repository; None for other names."""
    path = Path(name)
    if path.exists() or (path.suffix in WEIGHTS_ENDINGS and not str(name).startswith(PREFIX)):
        return None
    return parse_repository(name)


@functools.cache  # a command that asks twice gets the same commit
def _of_the_hub(repository, revision, with_weights):
    """Return the weights file of a repository's captioner, in the cache; see `checkpoint_file`."""
    if with_weights:
        file = _of_the_hub(repository, revision, False)
        if not file.exists():
            note(f"fetching {repository}, commit {file.parent.name[:8]}, into the hub's cache")
            for patterns in (BESIDE_WEIGHTS, [SHARED_WEIGHTS]):  # weights last: where they are, the rest is too
                fetch_commit(repository, file.parent.name, patterns)
        if not file.exists():
            raise ValueError(f"{repository} holds no captioner: it has no {SHARED_WEIGHTS}")
        for encoder in file.parent.glob(f"{SHARED_ENCODER}.*"):
            if holds_code(encoder):
                raise ValueError(
                    f"{repository} has a TorchScript program as its encoder, {encoder.name}, and downloaded code is "
                    f"never run: its author can push the encoder's state_dict() instead"
                )
        return file
    described = newest(repository, revision, SHARED_CONFIG)
    stored = described and read_json(described)
    if isinstance(stored, dict) and "graphs" in stored:
        raise ValueError(
            f"{repository} holds an exported captioner: `hf download {repository} --local-dir DIR`, and caption with "
            f"`clipcap DIR IMAGE`"
        )
    if not isinstance(stored, dict) or "model" not in stored:
        raise ValueError(f"{repository} holds no captioner: it has no {SHARED_CONFIG} as export.py --push puts there")
    return described.with_name(SHARED_WEIGHTS)


def holds_code(path):
    """Tell whether a file is a TorchScript program, which torch runs."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


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
