"""Causal language models and their tokenizers, as transformers names them."""

import collections
import functools
import importlib.util
import logging
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from models.attention import attend_in
from utils.cli import note
from utils.files import reason
from utils.hub import hub_answers
from utils.lean import lean

with lean():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.activations import NewGELUActivation
    from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # a bar for loading weights says nothing about the work


def load_language_model(source, load_in=None, device="cpu"):
    """Load a causal language model's weights.

    Args:
        source: a name of the hub, or a folder with config.json and weights.
        load_in: one of LOAD_IN, for weights that are not trained; None: float32.
        device: where the weights of `8bit` and `4bit` go, which cannot move later.
    Returns: the model, in evaluation mode.
    Raises: FileNotFoundError where it is not on disk and cannot be fetched; ValueError where it is no causal language
        model or a package is missing.
    """
    if load_in in (None, "16bit"):
        dtype = torch.bfloat16 if load_in else torch.float32
        return attend_in(_fuse_gelu(_from_pretrained(AutoModelForCausalLM, source, dtype=dtype).eval()))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--load_in {load_in} needs the package bitsandbytes: pip install bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_8bit=load_in == "8bit", load_in_4bit=load_in == "4bit")
    return _from_pretrained(
        AutoModelForCausalLM, source, quantization_config=quantization, device_map={"": device}
    ).eval()


def build_language_model(config, dtype=torch.float32):
    """Build a causal language model with fresh weights, to be filled from a checkpoint.

    Args:
        config: its configuration, as transformers' object.
    """
    return attend_in(_fuse_gelu(AutoModelForCausalLM.from_config(config, dtype=dtype).eval()))


def _fuse_gelu(gpt):
    """Run GPT-2's activation as one kernel instead of eight, each of which saves a tensor for the backward pass."""
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

    Raises: FileNotFoundError where it is not on disk and cannot be fetched; ValueError where it is empty, which is what
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


def decoder_layers(gpt):
    """Return (name, ModuleList) of a language model's decoder layers."""
    lists = ((name, module) for name, module in gpt.named_modules() if isinstance(module, torch.nn.ModuleList))
    return max(lists, key=lambda item: len(item[1]))


def split_layers(gpt, devices):
    """Put the decoder layers on several devices; everything else goes to the first.

    Args:
        gpt: causal language model.
        devices: the device of every decoder layer.
    Returns: the model, with hooks that move activations between devices.
    """
    from accelerate import dispatch_model

    name, layers = decoder_layers(gpt)
    device_map = {f"{name}.{i}": device for i, device in enumerate(devices)}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for path, module in gpt.named_modules():
        if not list(module.children()) and id(module) not in inside:
            device_map[path] = devices[0]
    return dispatch_model(gpt, device_map, main_device=devices[0], force_hooks=True)


def offload(gpt, devices, max_memory=None, offload_dir=None):
    """Put as much of a language model as fits on the devices, then as fits in main memory, and the rest on disk.

    Args:
        gpt: causal language model, on the CPU.
        devices: GPUs, or the CPU alone.
        max_memory: memory that weights may take on each device, such as `14GB`; None: what accelerate finds free.
        offload_dir: folder for what does not fit in memory; it goes into a subfolder, deleted with the model.
    Returns: the model, with hooks that fetch weights as they are needed.
    Raises: ValueError where a part fits nowhere.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    names = [(d.index or 0) if d.type == "cuda" else d.type for d in devices]  # as accelerate names devices
    room = {name: max_memory or free[name] for name in names}
    room.setdefault("cpu", free["cpu"])
    try:
        device_map = infer_auto_device_map(gpt, room, no_split_module_classes=gpt._no_split_modules)
    except ValueError as error:
        raise ValueError(f"--max_memory {max_memory}: {reason(error)}") from None
    if device_map.get("", names[0]) not in names:
        raise ValueError("the language model's largest part does not fit on the devices; raise --max_memory")
    if "disk" in device_map.values():
        if not offload_dir:
            raise ValueError(
                "the language model does not fit in the devices' and the main memory; pass --offload_dir DIR to keep "
                "the rest on the disk"
            )
        Path(offload_dir).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=offload_dir, prefix="offload-")
        weakref.finalize(gpt, folder.cleanup)
        offload_dir = folder.name
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # the note below says the same
    parts = collections.Counter(map(str, device_map.values()))
    note("language model: " + ", ".join(f"{count} parts on {place}" for place, count in parts.items()))
    return dispatch_model(gpt, device_map, main_device=names[0], offload_dir=offload_dir, force_hooks=True)


def checkpoint_layers(gpt):
    """Keep only the decoder layers' inputs for the backward pass and compute the rest again (gradient checkpointing).

    The library's own switch does nothing in evaluation mode, in which a frozen model stays.
    """
    for layer in decoder_layers(gpt)[1]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _from_pretrained(auto_class, source, **options):
    """Call `auto_class.from_pretrained`, from disk if possible, else from the hub without minutes of retries."""
    options["trust_remote_code"] = False  # else transformers asks on the terminal whether to run what a folder holds
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file() and auto_class is not AutoTokenizer:
        raise FileNotFoundError(f"{source} holds no config.json: --language_model takes a model's folder or a hub name")
    try:
        return auto_class.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise ValueError(f"cannot load a language model from {source}: {error}") from None
        missing = error
    if hub_answers():
        try:
            return auto_class.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            missing = error
    raise FileNotFoundError(
        f"language model {source!r} is neither a folder nor in the local cache, and the hub gave no such model: "
        f"check the name, or copy its folder (config.json, model.safetensors, tokenizer.json) here and pass "
        f"--language_model FOLDER"
    ) from missing
