"""Checkpoints: a state dict (`.pt` or `.safetensors`) with a json beside it that says how to rebuild the captioner.

A predecessor's bare `.pt`, which has no json, is recognised by models/bare.py.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from accelerate import init_empty_weights

from models import foreign
from models.bare import guess_normalization, infer_config, infer_language_config
from models.captioner_files import beside, check_weights_file, config_path, tokenizer_folder
from models.clip_caption import build_captioner
from models.language import (
    build_language_model,
    check_tokenizer,
    load_language_config,
    load_language_model,
    load_tokenizer,
)
from models.lora import add_lora, merge_lora
from models.placement import get_weights
from models.settings import CaptionConfig
from utils.files import atomic_path, disk_errors, read_json, reason
from utils.lean import lean, undrawn
from utils.processes import is_main

with lean():
    from transformers import AutoConfig

FORMAT = 1  # of a run's json; older files, which have no number, are read too
# the keys that a run's json may have
KEYS = {"format", "model", "language_model_config", "training", "decoding", "data", "contents", "versions"}
# buffers that transformers stored before 4.31; no weights
OLD_BUFFERS = re.compile(r"gpt\.transformer\.h\.\d+\.attn\.(bias|masked_bias)")
OUTPUT = "gpt.lm_head.weight"  # the output layer


def save_torch(path, value):
    """Write `value` in torch's format, atomically; see `disk_errors`."""
    with atomic_path(path) as temporary, disk_errors(temporary.parent):
        torch.save(value, temporary)


def save_weights(path, state_dict):
    """Write a state dict atomically, as `.safetensors` where the name says so, else in torch's format."""
    if Path(path).suffix != ".safetensors":
        save_torch(path, state_dict)
        return
    with atomic_path(path) as temporary, disk_errors(temporary.parent):
        # safetensors refuses tensors that share memory, as the tied output layer does
        safetensors.torch.save_file({k: v.clone().contiguous() for k, v in state_dict.items()}, temporary)


def captioner_weights(model):
    """Return the weights for a captioner's checkpoint; every process must call it, process 0 gets all of them.

    A LoRA is merged into the language model, so that the checkpoint is like any other. Where the language model was
    loaded in fewer bits, only trained weights are kept.
    """
    weights = get_weights(model)
    if model.config.load_in:
        weights = {name: value for name, value in weights.items() if _is_trained(name)}
    elif any(value.is_meta for value in weights.values()):  # offloaded to memory or disk
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        weights |= {f"gpt.{name}": value for name, value in get_state_dict_offloaded_model(model.gpt).items()}
    return merge_lora(model, weights) if model.config.lora_rank and not model.config.load_in and is_main() else weights


def _is_trained(name):
    """Tell whether a weight belongs to the mapping network or a LoRA."""
    return name.startswith("clip_project.") or ".lora_" in name


def load_weights(path):
    """Read a state dict of tensors, running no code that the file may hold.

    Returns: name -> tensor, without the buffers that older versions of transformers stored.
    Raises: FileNotFoundError; ValueError where the file is damaged, holds code, or is no state dict.
    """
    path = Path(path)
    check_weights_file(path)
    try:
        state_dict = _read_weights(path)
    except Exception as error:  # on bytes that are no pickle, the reader can raise anything
        known = foreign.describe_file(path)
        if known:
            raise ValueError(f"{path} is no captioner's weights but {known}") from None
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} was not loaded: it is damaged, or holds more than tensors, which could run code; if you "
                f"trust it, load it elsewhere and save its state_dict()"
            ) from None
        raise ValueError(f"{path} is damaged or no checkpoint ({_cause(error)}); copy it again") from None
    known = foreign.describe_value(state_dict)
    if known:
        raise ValueError(f"{path} is no captioner's weights but {known}")
    tensors = isinstance(state_dict, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    )
    if not tensors or not state_dict:
        raise ValueError(f"{path} is no state dict: it must map names to tensors, clip_project.* and gpt.*")
    return {key: value for key, value in state_dict.items() if not OLD_BUFFERS.fullmatch(key)}


def _read_weights(path):
    """Return what torch or safetensors reads from a file of either format."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings():  # torch warns of pickle protocols that it does not write itself
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _cause(error):
    """Return a reader's error message; `another format` for errors that only show that it misread the bytes."""
    return (
        reason(error) if isinstance(error, OSError | RuntimeError | safetensors.SafetensorError) else "another format"
    )


def read_config(checkpoint, state_dict):
    """Return a checkpoint's configuration and where it came from.

    Returns: (CaptionConfig, its language model's configuration as a dict or None, the json's path or None).
    Raises: ValueError where the json beside the checkpoint is malformed.
    """
    path = config_path(checkpoint)
    if not path.is_file():
        return infer_config(state_dict, checkpoint), None, None
    stored = read_json(path)
    if not isinstance(stored, dict) or not stored.keys() & {"model", "format"}:
        return infer_config(state_dict, checkpoint), None, None
    check_format(stored, path)
    try:
        return CaptionConfig.from_dict(stored["model"]), stored.get("language_model_config"), path
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe a captioner: {error}") from None


def check_format(stored, path):
    """Refuse a run's json that a newer version wrote.

    Args:
        stored: what the json holds.
        path: named in the error.
    Raises: ValueError.
    """
    number = stored.get("format", FORMAT)
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(f"{path} has format {number} and this version reads up to {FORMAT}; update this one")
    unknown = stored.keys() - KEYS
    if unknown:
        raise ValueError(f"{path} has an unknown key {min(unknown)!r}: a newer version wrote it; update this one")


def load_captioner(checkpoint, language_model=None, normalize_prefix=None, device="cpu", mapped=False):
    """Rebuild a captioner from its checkpoint.

    Args:
        checkpoint: `.pt` or `.safetensors` file, ours or a predecessor's.
        language_model: name or folder to take tokenizer and configuration from; None: what the checkpoint says.
        normalize_prefix: for a checkpoint that does not say.
        device: where a language model of 8 or 4 bits goes, which cannot move later.
        mapped: leave the weights in the file, where it can be mapped into memory, until `own_weights` of
            utils.precision copies what is left of them then.
    Returns: (ClipCaptionModel in evaluation mode on the CPU, tokenizer, whether a json described it).
    Raises: ValueError where an argument contradicts the checkpoint or weights and configuration do not fit;
        FileNotFoundError where a file is missing.
    """
    state_dict = load_weights(checkpoint)
    config, language_config, described = read_config(checkpoint, state_dict)
    if normalize_prefix is not None:
        if described and normalize_prefix != config.normalize_prefix:
            raise ValueError(
                f"--normalize_prefix contradicts {described}: the captioner was trained "
                f"{'with' if config.normalize_prefix else 'without'} it; leave the flag out"
            )
        config.normalize_prefix = normalize_prefix
    elif not described:
        guess_normalization(checkpoint, config, state_dict)
    gpt_config = _language_config(checkpoint, config, language_config, language_model, state_dict)
    source = language_model or _tokenizer_source(config, described)
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, gpt_config, source)
    if language_model:
        config.language_model = language_model
    if config.load_in:  # the checkpoint holds only what was trained beside the language model
        model = build_captioner(
            config, load_language_model(beside(config.language_model, described), config.load_in, device)
        )
        if config.lora_rank:
            add_lora(model.gpt, config.lora_rank)
        own = model.state_dict()
        state_dict = {name: value for name, value in own.items() if not _is_trained(name)} | state_dict
    else:
        with undrawn(), init_empty_weights():  # no random initialisation, which the checkpoint would overwrite
            model = build_captioner(config, build_language_model(gpt_config))
    _fill(model, state_dict, checkpoint, mapped)
    return model.eval(), tokenizer, described is not None


def _language_config(checkpoint, config, stored, language_model, state_dict):
    """Return transformers' configuration of the checkpoint's language model."""
    given = load_language_config(language_model) if language_model else None
    if stored is None:
        inferred = infer_language_config(state_dict) if given is None else given
        if inferred is None:
            raise ValueError(
                f"{checkpoint} does not say which language model it holds; pass --language_model NAME or FOLDER"
            )
        return inferred
    ours = AutoConfig.for_model(**stored)
    if given is not None and _architecture(given) != _architecture(ours):
        raise ValueError(
            f"--language_model {language_model} contradicts {checkpoint}: it is {_architecture(given)} "
            f"and the checkpoint holds {_architecture(ours)} (model type, layers, width, vocabulary)"
        )
    return ours


def _architecture(config):
    """Return what two configurations of the same language model share."""
    return (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def _tokenizer_source(config, described):
    """Return where the tokenizer is: the folder saved beside the checkpoint, else the language model."""
    folder = described and tokenizer_folder(described)
    return str(folder) if folder and folder.is_dir() else beside(config.language_model, described)


def _fill(model, state_dict, path, mapped):
    """Load weights into a captioner, strictly; `mapped`: see `load_captioner`.

    Raises: ValueError naming the first misfit.
    """
    own, state_dict = model.state_dict(), with_output(model, state_dict)
    missing = [key for key in own if key not in state_dict]
    extra = [key for key in state_dict if key not in own]
    misfit = [key for key in own if key in state_dict and own[key].shape != state_dict[key].shape]
    if misfit:
        key = misfit[0]
        raise ValueError(
            f"{path} does not fit: {key} is {list(state_dict[key].shape)} and {list(own[key].shape)} was expected; "
            f"pass the --language_model it was trained with"
        )
    if missing or extra:
        what = f"it lacks {missing[0]}" if missing else f"it holds {extra[0]}, which the captioner does not have"
        raise ValueError(f"{path} does not fit: {what} ({len(missing)} missing, {len(extra)} unknown names)")
    check_tied(model, state_dict, path)
    if not any(value.is_meta for value in own.values()):
        model.load_state_dict(state_dict)
        return
    # a mapped tensor changes when its file does
    given = {key: state_dict[key].to(own[key].dtype, copy=not mapped) for key in own}
    model.load_state_dict(given, assign=True)
    model.gpt.tie_weights()


def without_output(model, state_dict):
    """Return a captioner's weights without a tied output layer, so that the embeddings are stored once."""
    return {key: value for key, value in state_dict.items() if key != OUTPUT or not _is_tied(model)}


def with_output(model, state_dict):
    """Return a captioner's weights with the output layer that `without_output` may have left out."""
    own = model.state_dict()
    if OUTPUT in state_dict or OUTPUT not in own or not _is_tied(model):
        return state_dict
    return {**state_dict, OUTPUT: state_dict.get(_tied_key(model), own[OUTPUT])}


def check_tied(model, state_dict, path):
    """Refuse weights whose output layer differs from the input embeddings where the language model ties the two.

    Args:
        model: captioner to load them into, which has the same names and shapes.
        state_dict: the weights, named `path` in the error.
    Raises: ValueError.
    """
    if OUTPUT not in model.state_dict() or not _is_tied(model):
        return
    inputs, outputs = state_dict[_tied_key(model)], state_dict[OUTPUT]
    if inputs.data_ptr() != outputs.data_ptr() and not torch.equal(inputs, outputs.to(inputs.dtype)):
        raise ValueError(
            f"{path} holds input embeddings and an output layer ({OUTPUT}) that differ, but the language model ties "
            f"them: the file is damaged, or was trained with tie_word_embeddings false; then set that in the "
            f"language_model_config of its json, or in the config.json of --language_model"
        )


def _is_tied(model):
    """Tell whether a captioner's language model has one tensor for input embeddings and output layer."""
    return getattr(model.gpt.config.get_text_config(), "tie_word_embeddings", False)


def _tied_key(model):
    """Return the name of the input embeddings among a captioner's weights."""
    embeddings = model.gpt.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)
