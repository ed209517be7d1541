"""Vision-only towers of timm: `timm:NAME`, `timm:NAME/FILE`.

Axes: B batch, D width, K patches.
"""

import functools
import math
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from encoders.base import ImageEncoder, Published, plain_steps, quiet
from encoders.names import POOLED
from utils.cli import nearest
from utils.files import reason, sha256
from utils.hub import cached_first

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
VISION_TRANSFORMERS = ("vision_transformer", "eva", "beit", "deit")  # timm's modules whose models are listed
VARIABLE = ("naflexvit", "gemma4_vit", "qwen3_vit")  # models whose inputs have no fixed size


class Timm(ImageEncoder):
    """A tower of timm without its classifier."""

    def __init__(self, name, device="cpu", dtype=None, tokens=None):
        """Load the encoder.

        `pooled` is timm's output with num_classes=0: the class token, mean or attention pooling, depending on the
        model; `patches` are the tokens before that pooling, without class and register tokens.

        Args:
            name: `timm:` and a timm name, with or without its tag; after a slash, a weights file.
            device, dtype, tokens: see `load_encoder`.
        Raises: ValueError for an unknown name, inputs of variable size, weights of another model, or `patches` of a
            model that has none; FileNotFoundError where the weights are not on disk and cannot be fetched.
        """
        super().__init__(name, device, dtype, tokens)
        model_name, _, file = self.name.partition(":")[2].partition("/")
        self.tag = None if file else _config(model_name).tag or None
        path = Path(file) if file else _fetch(model_name)
        if not path.is_file():
            raise FileNotFoundError(f"--clip_model_type {name}: {file} does not exist")
        model = _load(model_name, path, own=bool(file))
        config = resolve_model_data_config(model)
        preprocess = plain_steps(create_transform(**config, is_training=False))
        self.grid = patch_grid(model)
        self._take(model, preprocess, config["input_size"][1:])
        self.sha256 = sha256(path)

    def _embed(self, pixels):
        if self.tokens == POOLED:
            return self.model(pixels)
        return patch_tokens(self.model, self.model.forward_features(pixels), self.name)


def patch_grid(model):
    """Return (rows, columns) of a model's patches, or None where it has no fixed grid."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return tuple(grid) if grid else None


def patch_tokens(model, features, name):
    """Return the patch tokens [B, K, D] among a timm model's features before pooling.

    Args:
        model: of timm.
        features: what its `forward_features` returns: a grid of either layout, or a sequence.
        name: of the encoder.
    Raises: ValueError where `features` is neither, or patches cannot be told from other tokens.
    """
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) == 4 and model.num_features in (shape[1], shape[3]):
        return features.flatten(2).transpose(1, 2) if shape[1] == model.num_features else features.flatten(1, 2)
    if len(shape) == 3 and shape[2] == model.num_features:
        tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
        grid = patch_grid(model)
        if tokens.shape[1] == (math.prod(grid) if grid else math.isqrt(tokens.shape[1]) ** 2):
            return tokens
        if not grid or tokens.shape[1] < math.prod(grid) and math.isqrt(tokens.shape[1]) ** 2 == tokens.shape[1]:
            return tokens  # of a pyramid, whose last grid is coarser than its first
    raise ValueError(f"--tokens patches: {name} has no patch tokens that can be told apart; use --tokens pooled")


def _config(model_name):
    """Return timm's pretrained configuration of a name.

    Raises: ValueError for an unknown name, or a model whose inputs have no fixed size.
    """
    arch, _, tag = model_name.partition(".")
    if not timm.is_model(arch):
        raise ValueError(f"--clip_model_type timm:{model_name} is unknown{nearest(arch, timm.list_models())}")
    if arch.startswith(VARIABLE):
        raise ValueError(f"--clip_model_type timm:{model_name} takes inputs of variable size (NaFlex): use a fixed one")
    names = timm.list_pretrained(f"{arch}.*")
    if tag and model_name not in names:
        raise ValueError(
            f"--clip_model_type timm:{model_name}: there is no such tag of {arch}, which has "
            f"{', '.join(name.partition('.')[2] for name in names) or 'none'}"
        )
    return timm.get_pretrained_cfg(model_name)


def _fetch(model_name):
    """Return the file of a model's published weights.

    Raises: ValueError where there are none; FileNotFoundError where they are not cached and cannot be fetched.
    """
    config, remedy = _config(model_name), f"pass timm:{model_name}/FILE"
    if not config.hf_hub_id:
        raise ValueError(f"--clip_model_type timm:{model_name}: timm knows no weights on the hub; {remedy}")
    repo, _, revision = config.hf_hub_id.partition("@")
    for filename in [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES:
        try:
            with quiet():
                return Path(cached_first(lambda f=filename: hf_hub_download(repo, f, revision=revision or None)))
        except (OSError, ValueError) as error:  # also for a file that the repository lacks
            missing = error
    raise FileNotFoundError(
        f"--clip_model_type timm:{model_name}: its weights are not in the cache and cannot be fetched "
        f"({reason(missing)}): check the network, or {remedy}"
    )


def _load(model_name, path, own):
    """Build a model with the weights of a file; raises ValueError where they are another model's.

    Args:
        own: whether the file is the user's, not a published one.
    """
    results, plain = [], nn.Module.load_state_dict

    def watched(module, *arguments, **options):
        results.append(plain(module, *arguments, **options))
        return results[-1]

    overlay = {"file": str(path)} | ({} if path.suffix in (".npz", ".npy") else {"custom_load": False})
    nn.Module.load_state_dict = watched  # timm only logs which weights are missing
    try:
        with quiet():
            model = timm.create_model(model_name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm's checkpoint filters can raise anything
        raise ValueError(f"{path} holds no weights of timm:{model_name} ({reason(error)})") from None
    finally:
        nn.Module.load_state_dict = plain
    missing = [key for result in results for key in result.missing_keys]
    unexpected = [key for result in results for key in result.unexpected_keys if own]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        raise ValueError(f"{path} holds another model's weights than timm:{model_name}: it {what}")
    return model


@functools.cache
def shape_of(arch):
    """Return (width, pixels per side of a patch, [rows, columns] of pixels) of an architecture."""
    model = outline(arch)
    stages = getattr(model, "feature_info", None)
    reduction = stages[-1]["reduction"] if isinstance(stages, list) else None
    return model.num_features, reduction, resolve_model_data_config(model)["input_size"][1:]


def outline(arch):
    """Return an architecture without weights, a transformer with one layer: enough for its outputs' shapes."""
    with quiet(), torch.device("meta"):
        try:
            return timm.create_model(arch, num_classes=0, depth=1)
        except (TypeError, RuntimeError, AssertionError):  # it takes no `depth`
            return timm.create_model(arch, num_classes=0)


def published(word):
    """Yield a Published for every tag of a vision transformer that contains `word`; other models work unlisted."""
    for module in VISION_TRANSFORMERS:
        for name in timm.list_models(module=module, pretrained=True):
            if word in f"timm:{name}" and not name.startswith(VARIABLE):
                width, reduction, size = shape_of(name.partition(".")[0])
                patches = reduction and math.prod(side // reduction for side in size)
                yield Published(f"timm:{name}", width, patches, width, max(size), False)
