"""Files given as a captioner's weights that are something else: what they are, and what to do instead."""

import zipfile

from features.kinds import HEAD, is_picture, what_else
from utils.outputs import belongs_to

STORE = "a feature store, which train.py --data takes"
ENCODER = "an encoder's file, which --clip_model_type takes"
STATE = "the state of a training run, which train.py --resume reads; pass its <prefix>_latest.pt"
LANGUAGE_MODEL = "a language model's weights, whose folder --language_model takes"
WRAPPED = ("state_dict", "model_state_dict", "model")  # keys under which other trainers keep a state dict
# starts of the weight names of a language model saved on its own, not under gpt.*
LANGUAGE_MODELS = ("transformer.h.", "h.", "wte.", "model.layers.", "model.decoder.", "decoder.", "lm_head.")


def describe_folder(path):
    """Say what a folder is."""
    if (path / "img_emb").is_dir():
        return STORE
    there = sorted(file.name for pattern in ("*.pt", "*.safetensors") for file in path.glob(pattern))
    weights = [name for name in there if not name.endswith("_state.pt")]
    if (path / "config.json").is_file():
        return "a language model's folder, which --language_model takes"
    return f"a folder; pass a file in it{f', such as {weights[-1]}' if weights else ''}"


def describe_file(path):
    """Say what a file is that torch cannot read as tensors alone, or return None."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PK\3\4"):
        return _describe_archive(path)
    if b"clip_embedding" in head:  # a key in a store's pickle, which is not unpickled here
        return STORE
    if is_picture(head):
        return "a picture, which is given without a flag"
    owner = belongs_to(path)
    return f"the json of {owner}; pass the file beside it" if owner else what_else(head)


def _describe_archive(path):
    """Say what a zip archive is, the format of torch's own files."""
    if not zipfile.is_zipfile(path):
        return "a piece of one, cut short by an interrupted copy or download; copy it again"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names):
        return f"a TorchScript program, as those of OpenAI's CLIP: {ENCODER}"
    if not any(name.endswith("/data.pkl") for name in names):
        return "a zip archive of other files"
    return None


def describe_value(value):
    """Say what a loaded value is, or return None where it may be a captioner's state dict."""
    if not isinstance(value, dict):
        return None
    if {"clip_embedding", "captions"} <= value.keys():
        return STORE
    if {"optimizer", "scheduler"} <= value.keys() or {"state", "param_groups"} == value.keys():
        return STATE
    inner = next((key for key in WRAPPED if isinstance(value.get(key), dict)), None)
    if inner:
        return f"a file of another trainer, with the weights under {inner!r}; save only those with torch.save"
    return _describe_weights(value) if all(isinstance(key, str) for key in value) else None


def _describe_weights(state_dict):
    """Say whose weights a state dict holds, or return None."""
    if any(key.startswith(("gpt.", "clip_project.")) for key in state_dict):
        return None
    if any(".clip_project." in key for key in state_dict):
        prefix = next(key for key in state_dict if ".clip_project." in key).split("clip_project.")[0]
        return f"a captioner saved inside another module; save its state_dict() without {prefix!r} before the names"
    if any(key.startswith(("visual.", "vision_model.")) for key in state_dict):
        return ENCODER
    if any(key.startswith(LANGUAGE_MODELS) for key in state_dict):
        return LANGUAGE_MODEL
    return None
