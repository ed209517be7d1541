"""Causal language models and their tokenizers, as transformers names them."""

import os
import urllib.request
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # a bar for loading weights says nothing about the work
CONNECT_TIMEOUT = 10  # seconds; transformers itself retries for minutes


def load_language_model(source, dtype=torch.float32):
    """Load a causal language model's weights.

    Args:
        source: a name of the hub, or a folder with config.json and weights.
        dtype: of the weights.
    Returns: the model, in evaluation mode.
    Raises: FileNotFoundError where it is neither here nor reachable; ValueError where it is no causal language model.
    """
    return _fuse_gelu(_from_pretrained(AutoModelForCausalLM, source, dtype=dtype).eval())


def build_language_model(config, dtype=torch.float32):
    """Build a causal language model with fresh weights, to be filled from a checkpoint.

    Args:
        config: its configuration, as transformers' object.
    """
    return _fuse_gelu(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


def _fuse_gelu(gpt):
    """Let GPT-2's activation run as one kernel instead of eight, each of which training keeps a tensor for."""
    for parent in list(gpt.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))
    return gpt


def load_language_config(source):
    """Load the configuration of a causal language model; see `load_language_model`."""
    return _from_pretrained(AutoConfig, source)


def load_tokenizer(source):
    """Load the tokenizer of a language model.

    Raises: FileNotFoundError where it is neither here nor reachable; ValueError where it is empty, which is what
        transformers silently returns when only a part of its files is there.
    """
    tokenizer = _from_pretrained(AutoTokenizer, source)
    if not tokenizer.encode("a photo", add_special_tokens=False):
        raise ValueError(
            f"the tokenizer of {source} came out empty: its files are missing or incomplete. Put tokenizer.json "
            f"(or vocab.json and merges.txt) into a folder and pass --language_model FOLDER"
        )
    return tokenizer


def check_tokenizer(tokenizer, config, source):
    """Refuse a tokenizer that can make ids the language model has no embedding for.

    Raises: ValueError.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the language model only {config.vocab_size} "
            f"embeddings: they do not belong together; pass the --language_model it was trained with"
        )


def context_length(config):
    """Return how many positions a language model takes, prefix included, or None where it sets no limit."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(limit) if limit else None


def split_layers(gpt, devices):
    """Put the decoder layers on several devices; everything else goes to the first.

    Args:
        gpt: causal language model.
        devices: the device of every decoder layer.
    Returns: the model, which moves activations itself.
    """
    from accelerate import dispatch_model

    name, layers = max(
        ((n, m) for n, m in gpt.named_modules() if isinstance(m, torch.nn.ModuleList)), key=lambda item: len(item[1])
    )
    device_map = {f"{name}.{i}": device for i, device in enumerate(devices)}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for path, module in gpt.named_modules():
        if not list(module.children()) and id(module) not in inside:
            device_map[path] = devices[0]
    return dispatch_model(gpt, device_map, main_device=devices[0], force_hooks=True)


def _from_pretrained(auto_class, source, **options):
    """Call `auto_class.from_pretrained`, from the disk where possible, without minutes of retries elsewhere."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file() and auto_class is not AutoTokenizer:
        raise FileNotFoundError(f"{source} holds no config.json: --language_model takes a model's folder or a hub name")
    try:
        return auto_class.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise ValueError(f"cannot load a language model from {source}: {error}") from None
        missing = error
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", "") and _hub_answers():
        try:
            return auto_class.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            missing = error
    raise FileNotFoundError(
        f"language model {source!r} is neither a folder nor in the local cache, and the hub gave no such model: "
        f"check the name, or copy its folder (config.json, model.safetensors, tokenizer.json) here and pass "
        f"--language_model FOLDER"
    ) from missing


def _hub_answers():
    """Tell whether the model hub can be reached, through the user's proxy settings."""
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=CONNECT_TIMEOUT):
            return True
    except OSError:
        return False
