"""Where the files of a captioner are, and what its json says of decoding; loads no weights."""

import os
import re
from pathlib import Path

from encoders import check_encoder, split_path
from models import foreign
from models.pretrained import ALIASES, PRETRAINED, checkpoint_file, repository_of
from models.settings import DecodingConfig
from utils.files import read_json

# what follows the run's name in `<prefix>-000.pt`, `<prefix>_latest.pt` and `<prefix>_best.pt`
RUN_SUFFIX = re.compile(r"(-\d{3,}|_latest|_best)$")


def config_path(checkpoint):
    """Return the json that belongs to a checkpoint file: `run-000.pt`, `run_latest.pt` -> `run.json`."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(RUN_SUFFIX.sub("", checkpoint.stem) + ".json")


def check_captioner(checkpoint, clip_model_type=None, flag="--checkpoint"):
    """Refuse a captioner or encoder that is not there, before the libraries that load it are imported.

    Args:
        checkpoint, clip_model_type: as of `Captioner`.
        flag: the option that names the captioner.
    Raises: FileNotFoundError, ValueError.
    """
    if ALIASES.get(checkpoint, checkpoint) not in PRETRAINED:  # published ones are fetched on loading
        file = checkpoint_file(checkpoint, flag, with_weights=False)
        if not repository_of(checkpoint):
            check_weights_file(file)
    if clip_model_type:
        check_encoder(clip_model_type)


def is_export(folder):
    """Tell whether a path is a folder that export.py wrote."""
    file = Path(folder) / "captioner.json"
    if not file.is_file():
        return False
    described = read_json(file)
    return isinstance(described, dict) and "graphs" in described


def check_export_dtype(folder, dtype):
    """Refuse the flag --dtype for a folder that export.py wrote, whose dtype is fixed; raises ValueError."""
    if dtype:
        raise ValueError(f"--dtype {dtype}: {folder} has the numbers that export.py gave it; leave it out")


def check_weights_file(path):
    """Refuse a file of weights that does not exist.

    Raises: FileNotFoundError, naming checkpoints that are there; ValueError for a folder, saying what it is.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is no captioner's weights but {foreign.describe_folder(path)}")
    if path.is_file():
        return
    folder = path.parent if path.parent.is_dir() else Path()
    there = sorted(p.name for p in folder.glob("*.pt"))[:8]
    raise FileNotFoundError(f"checkpoint {path} does not exist{'; there are ' + ', '.join(there) if there else ''}")


def beside(name, described):
    """Return the file or folder of this name beside a checkpoint's json, where there is one, else the name.

    Args:
        name: of a language model or an encoder; "" or None stays.
        described: the json, or None.
    """
    path = described and name and described.parent / name
    return str(path) if path and path.exists() else name


def tokenizer_folder(config_json):
    """Return the folder of the tokenizer that is saved with a run: `run.json` -> `run_tokenizer`."""
    config_json = Path(config_json)
    return config_json.with_name(config_json.stem + "_tokenizer")


def stored_decoding(checkpoint):
    """Return the DecodingConfig in the json beside a checkpoint, or None where there is none.

    Args:
        checkpoint: as that of Captioner.
    Raises: ValueError where the json is malformed or holds an unknown setting.
    """
    if ALIASES.get(checkpoint, checkpoint) in PRETRAINED:
        return None
    path = config_path(checkpoint_file(checkpoint, with_weights=False))
    stored = read_json(path) if path.is_file() else None
    if not isinstance(stored, dict) or "decoding" not in stored:
        return None
    return DecodingConfig.from_dict(stored["decoding"], path)


def captioner_files(checkpoint, clip_model_type=None, language_model=None):
    """Return the existing files that a captioner is loaded from, of those that the arguments and its json name.

    Args:
        checkpoint, clip_model_type, language_model: as of `Captioner`.
    """
    named = [clip_model_type, language_model]
    if ALIASES.get(checkpoint, checkpoint) in PRETRAINED:
        files, described = [], Path("none")
    else:
        checkpoint = checkpoint_file(checkpoint, with_weights=False)
        described = config_path(checkpoint)
        files = [checkpoint, described]
    if described.is_file():
        config = read_json(described)
        model = config.get("model") if isinstance(config, dict) else None
        named += [model.get(key) for key in ("clip_model_type", "language_model")] if isinstance(model, dict) else []
    for name in filter(None, (name and (split_path(name)[1] or name) for name in named)):
        for path in (Path(name), described.parent / name):
            files += path.iterdir() if path.is_dir() else [path]
    return [file for file in files if os.path.exists(file)]
