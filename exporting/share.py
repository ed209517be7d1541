"""A captioner as others load it: safetensors, json, tokenizer, and its encoder where that has no public name."""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from encoders import encoder_sha256, public_name, split_path
from exporting.card import make_card, read_scores
from models.captioner import encoder_source
from models.captioner_files import beside, config_path
from models.checkpoint import FORMAT, load_captioner, load_weights, save_weights, without_output
from models.pretrained import (
    ALIASES,
    PRETRAINED,
    SHARED_CONFIG,
    SHARED_ENCODER,
    SHARED_TOKENIZER,
    SHARED_WEIGHTS,
    checkpoint_file,
    holds_code,
)
from utils.cli import VERSION
from utils.files import read_json, write_json, write_text

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a language model


def describe_shared(args, decoding, config, gpt_config):
    """Return the contents of a shared captioner's captioner.json, without folders of this machine.

    Args:
        args: of export.py's command line. decoding: DecodingConfig.
        config: CaptionConfig. gpt_config: the language model's configuration.
    Returns: (the json, the encoder's name on this machine, the language model's name on the hub or None).
    Raises: as `encoder_source`.
    """
    file = checkpoint_file(args.checkpoint)
    path = config_path(file)
    stored = read_json(path) if path.is_file() else {}
    is_run = isinstance(stored, dict) and "model" in stored
    given = args.clip_model_type or getattr(published(args), "clip_model_type", None)
    encoder = public_name(encoder_source(config, file, given, is_run))
    prefix, own = split_path(encoder)
    travelling = f"{prefix}{SHARED_ENCODER}{'' if own and os.path.isdir(own) else Path(own or '').suffix}"
    language_model = config.language_model if is_public(config.language_model, path) else ""
    model = config.to_dict() | {
        "language_model": language_model,
        "clip_model_type": travelling if own else encoder,
        "clip_sha256": encoder_sha256(encoder) or config.clip_sha256,
    }  # fmt: skip
    kept = {key: without_folders(stored[key]) for key in ("training", "data", "contents") if is_run and key in stored}
    versions = {"clipcap": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    described = {
        "format": FORMAT, "model": model, "language_model_config": without_folders(gpt_config.to_dict()), **kept,
        "decoding": asdict(decoding), "versions": versions,
    }  # fmt: skip
    return described, encoder, language_model or None


def published(args):
    """Return the Pretrained that --checkpoint names, or None."""
    return PRETRAINED.get(ALIASES.get(args.checkpoint, args.checkpoint))


def is_public(name, described):
    """Tell whether a language model's name is one of the hub, not a folder here or beside the json."""
    return bool(name and HUB_NAME.fullmatch(name)) and not Path(beside(name, described)).exists()


def without_folders(value):
    """Return a value from a json, with this machine's paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    path = split_path(value)[1]
    is_path = path and (os.path.isabs(path) or path.startswith((".", "~")) or os.path.exists(path))
    return value.removesuffix(path) + Path(path).name if is_path else value


def write_shared(args, decoding, folder):
    """Write a captioner's folder as --checkpoint takes it, also from the hub.

    Returns: as `describe_shared`, without the encoder.
    Raises: ValueError where the captioner needs a language model that only this machine has; as `load_captioner`.
    """
    file = checkpoint_file(args.checkpoint)
    normalize = getattr(published(args), "normalize_prefix", None) if args.normalize_prefix is None else True
    model, tokenizer, _ = load_captioner(file, args.language_model, normalize)
    described, encoder, base_model = describe_shared(args, decoding, model.config, model.gpt.config)
    if model.config.load_in and not base_model:
        raise ValueError(
            f"{file} holds only what was trained beside {model.config.language_model}, a folder of this machine, so "
            f"that nobody else can load it: train with a name of the hub in --language_model"
        )
    own = split_path(encoder)[1]
    if own and os.path.isdir(own):
        shutil.copytree(own, folder / SHARED_ENCODER)
    elif own and holds_code(own):
        raise ValueError(
            f"{own} is a TorchScript program, which is unsafe for others to run: save its state_dict(), and pass that "
            f"as --clip_model_type"
        )
    elif own:
        shutil.copyfile(own, folder / described["model"]["clip_model_type"].removeprefix(split_path(encoder)[0]))
    tokenizer.save_pretrained(folder / SHARED_TOKENIZER)
    save_weights(folder / SHARED_WEIGHTS, without_output(model, load_weights(file)))
    write_json(folder / SHARED_CONFIG, described)
    return described, base_model


def write_card(args, described, base_model, folder):
    """Write the model card into an export's folder, which is to be pushed."""
    scores = read_scores(args.scores) if args.scores else None
    write_text(folder / "README.md", make_card(args.push, args.format, described, base_model, args.license, scores))
