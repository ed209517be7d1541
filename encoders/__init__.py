"""Image encoders: any of them behind one interface, `base.ImageEncoder`.

Each family is one module, the only one that imports its library: a class that loads a model and embeds a batch.
"""

import importlib
import os

from encoders.names import OPENAI_NAMES, SUFFIXES, check_openai, folder_sha256, openai_sha256
from utils.cli import note
from utils.files import sha256

OPENAI = "encoders.openai_clip", "OpenAIClip", None
FAMILIES = {  # start of a name -> module, class, pip package
    "open_clip": ("encoders.open_clip", "OpenClip", "open_clip_torch"),
    "hf-hub": ("encoders.open_clip", "OpenClip", "open_clip_torch"),
    "local-dir": ("encoders.open_clip", "OpenClip", "open_clip_torch"),
    "timm": ("encoders.timm", "Timm", "timm"),
    "hf": ("encoders.transformers", "Transformers", "transformers"),
}
FORMS = (
    "OpenAI's ViT-B/32 … or its file, open_clip:ARCH/TAG or /FILE, hf-hub:ORG/REPO, local-dir:FOLDER, timm:NAME or "
    "timm:NAME/FILE, hf:ORG/REPO or hf:FOLDER"
)
WITH_FILE = ("open_clip", "timm")  # forms in which a file may follow the first slash


def load_encoder(name, device="cpu", dtype=None, tokens=None):
    """Load an encoder.

    Args:
        name: what --clip_model_type takes: FORMS.
        device: torch device.
        dtype: as --dtype takes it; None: float32 on the CPU, elsewhere as the weights are stored.
        tokens: `pooled`, one vector per image; `patches`, all tokens of the last layer; None: `pooled`, or `patches`
            for an encoder that pools nothing.
    Returns: ImageEncoder.
    Raises: ValueError for an unknown name, a file that is no encoder, or a library that is not installed;
        FileNotFoundError where a published model is not in the cache and cannot be fetched.
    """
    module, kind, package = FAMILIES.get(_form(name), OPENAI)
    try:
        family = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"--clip_model_type {name} needs {error.name}; run: pip install {package}") from None
    return getattr(family, kind)(name, device, dtype, tokens)


def check_encoder(name):
    """Refuse an unknown name, as far as that can be told without importing a library.

    Args:
        name: what --clip_model_type takes.
    Raises: ValueError.
    """
    if _form(name) is None:
        check_openai(name)


def published(word=""):
    """Yield a Published for every name that contains `word`, from the installed libraries."""
    for module in ("encoders.openai_clip", *dict.fromkeys(module for module, _, _ in FAMILIES.values())):
        try:
            family = importlib.import_module(module)
        except ModuleNotFoundError as error:
            note(f"{error.name} is not installed: its encoders are left out")
            continue
        yield from family.published(word)


def _form(name):
    """Return the key of FAMILIES that a name starts with; None for OpenAI's names and files."""
    form, colon, _ = str(name).partition(":")
    return form if colon and form in FAMILIES else None


def split_path(name, base=""):
    """Split a name into (what precedes its file or folder, the path of that); the path is None for a model's name.

    `base` is a second folder in which the folder of `hf:FOLDER` is looked for.

    `open_clip:ViT-B-32/clip.pt` gives ("open_clip:ViT-B-32/", "clip.pt"), whether the file is there or not.
    """
    name, form = str(name), _form(name)
    if form is None:
        return ("", None) if openai_sha256(name) else ("", name)
    rest = name[len(form) + 1 :]
    if form in WITH_FILE:
        model, slash, rest = rest.partition("/")
        is_path = os.path.isfile(rest) or os.path.splitext(rest)[1] in SUFFIXES
        return f"{form}:{model}{slash}", rest if is_path else None
    is_folder = any(os.path.isdir(folder) for folder in (rest, os.path.join(base, rest)))
    return f"{form}:", rest if form == "local-dir" or (form == "hf" and is_folder) else None


def named_sha256(name):
    """Return the SHA-256 of the file that an OpenAI name stands for; None for other names."""
    return None if _form(name) else openai_sha256(name)


def encoder_sha256(name):
    """Return the SHA-256 of an encoder's weights; None where it cannot be told without loading them."""
    path = split_path(name)[1]
    if path is None:
        return named_sha256(name)
    if os.path.isdir(path):
        return folder_sha256(path)
    return sha256(path) if os.path.isfile(path) else None


def public_name(name):
    """Return an encoder's public name: OpenAI's for a copy of OpenAI's file, else the name itself."""
    weights = encoder_sha256(name)
    return next((known for known in OPENAI_NAMES if weights and named_sha256(known) == weights), name)


def known_encoder(described):
    """Return what identifies an encoder: its file's hash, stored or known by name, else its name; None: unknown.

    Args:
        described: dictionary from a store's json or a captioner's configuration.
    """
    name = described.get("clip_model_type")
    return described.get("clip_sha256") or named_sha256(name) or name
