"""OpenAI's CLIP, through its own package.

Axes: B batch, D width, K patches, N texts, R input resolution.
"""

import contextlib
import functools
import pickle
import threading
import urllib.error
import warnings
from pathlib import Path

import torch

from encoders.base import RESNET_STRIDE, ImageEncoder, Published
from encoders.names import POOLED, check_openai, openai_sha256
from utils.files import reason, sha256
from utils.lean import lean, undrawn
from utils.precision import prepare_for_inference

_loading = threading.Lock()  # what is patched is global, and differs by device
CONTEXT = 77  # tokens of CLIP's text tower, the begin and the end token among them


class OpenAIClip(ImageEncoder):
    """OpenAI's CLIP with its own preprocessing."""

    has_texts = True

    def __init__(self, name, device="cpu", dtype=None, tokens=None):
        """Load the encoder.

        `patches` are the tokens of a ViT's last layer after its last norm, before the projection, as wide as the tower
        (768 for ViT-B/32, whose embeddings are 512 wide); for a ResNet, the grid that its attention pooling reads
        (9 x 9, 2,560 wide, for RN50x4).

        Args:
            name: one of `clip.available_models()`, or the path of a CLIP `.pt` (state dict or JIT).
            device, dtype, tokens: see `load_encoder`.
        Raises: ValueError for a name that is neither, or a file that is no CLIP; FileNotFoundError where a named
            model is not in the cache and cannot be fetched.
        """
        super().__init__(name, device, dtype, tokens)
        clip = import_clip()
        self.model, self.preprocess = _load(clip, self.name, self.device)
        # images are RGB already; without this step, workers need not import clip
        self.preprocess.transforms.remove(clip.clip._convert_image_to_rgb)
        self.model.eval().requires_grad_(False)
        self.tokenize = clip.tokenize
        visual = self.model.visual
        self.input_resolution = visual.input_resolution  # R
        self.is_vit = hasattr(visual, "transformer")
        side = self.input_resolution // (visual.conv1.stride[0] if self.is_vit else RESNET_STRIDE)
        self.grid = (side, side)
        width = visual.ln_post.normalized_shape[0] if self.is_vit else visual.attnpool.k_proj.in_features
        self.shape = (self.model.text_projection.shape[1],) if self.tokens == POOLED else (side * side, width)
        prepare_for_inference(self.model, self.dtype, self.device)
        self.sha256 = openai_sha256(self.name) or sha256(self.name)

    def _embed(self, pixels):
        if self.tokens == POOLED:
            return self.model.encode_image(pixels)
        visual, read = self.model.visual, []
        pooling = visual.transformer if self.is_vit else visual.layer4  # the layer before it
        handle = pooling.register_forward_hook(lambda _module, _given, out: read.append(out))
        try:
            self.model.encode_image(pixels)
        finally:
            handle.remove()
        if self.is_vit:
            return visual.ln_post(read[0].transpose(0, 1)[:, 1:])  # [1 + K, B, D], the class token first
        return read[0].flatten(2).transpose(1, 2)  # [B, D, rows, columns]

    @torch.inference_mode()
    def encode_texts(self, texts, batch_size=256):
        """Embed texts, cut to CLIP's context; returns [N, D] float32 on the CPU, not normalised.

        Texts of similar length share a batch, cut to its longest: attention is causal, so padding changes nothing.
        """
        tokens = self.tokenize(texts, truncate=True)  # [N, 77]
        lengths = tokens.argmax(1) + 1  # the end token has the highest number
        order = lengths.argsort()
        embeddings = torch.empty(len(texts), self.embed_dim)
        for rows in order.split(batch_size) if texts else ():
            batch = tokens[rows, : lengths[rows].max()].to(self.device)
            embeddings[rows] = self.model.encode_text(batch).float().cpu()
        return embeddings

    def count_cut(self, texts):
        """Return how many texts are longer than CLIP's context, which `encode_texts` cuts them to."""
        long = (text for text in texts if len(text.encode()) > CONTEXT - 2)  # a token is at least one byte
        return sum(_is_cut(self.tokenize, text) for text in long)

    def _identity_sha256(self):
        return None if openai_sha256(self.name) else self.sha256


def _is_cut(tokenize, text):
    """Tell whether a text is too long for CLIP's tokenizer, which then raises an error."""
    try:
        tokenize(text)
    except RuntimeError:
        return True
    return False


@functools.cache
def import_clip():
    """Return OpenAI's module; importing it takes a second, and not every command needs it."""
    with lean():
        import clip
    return clip


def _build(module, device, state_dict):
    """Call `build_model` of clip's module without what is undone at once: initialising, and halving on a CPU.

    There `clip.load` makes a model float32 that this made float16, which changes nothing where the file is float16, as
    OpenAI's are.
    """
    first = state_dict.get("visual.conv1.weight")
    with undrawn(language_models=False), contextlib.ExitStack() as undo:
        if device.type == "cpu" and getattr(first, "dtype", None) == torch.float16:
            undo.callback(setattr, module, "convert_weights", module.convert_weights)
            module.convert_weights = lambda _model: None
        return module.build_model(state_dict)


def _load(clip, name, device):
    """Call `clip.load`, with errors that say what to do."""
    check_openai(name)
    try:
        with _loading, contextlib.ExitStack() as undo, warnings.catch_warnings():
            undo.callback(setattr, clip.clip, "build_model", clip.clip.build_model)
            clip.clip.build_model = functools.partial(_build, clip.model, device)
            warnings.filterwarnings("ignore", message=".*torch.jit.load. is deprecated")
            return clip.load(name, device=device, jit=False)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        file = Path(clip.clip._MODELS[name]).name
        raise FileNotFoundError(
            f"CLIP {name} is not in the cache and cannot be downloaded ({error}): put {file} into "
            f"{Path('~/.cache/clip').expanduser()}, or pass its path as --clip_model_type"
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} is no CLIP in OpenAI's format: it is damaged, or holds more than tensors, which could run code; "
            f"--clip_model_type takes OpenAI's files or a state dict"
        ) from None
    except (RuntimeError, KeyError, AttributeError, EOFError) as error:
        raise ValueError(f"{name} is no CLIP in OpenAI's format ({reason(error)})") from None


# name -> width of an embedding, patches, width of a patch, resolution
PUBLISHED = {
    "RN50": (1024, 49, 2048, 224), "RN101": (512, 49, 2048, 224), "RN50x4": (640, 81, 2560, 288),
    "RN50x16": (768, 144, 3072, 384), "RN50x64": (1024, 196, 4096, 448), "ViT-B/32": (512, 49, 768, 224),
    "ViT-B/16": (512, 196, 768, 224), "ViT-L/14": (768, 256, 1024, 224), "ViT-L/14@336px": (768, 576, 1024, 336),
}  # fmt: skip


def published(word):
    """Yield a Published for every name that contains `word`."""
    for name, shape in PUBLISHED.items():
        if word in name:
            yield Published(name, *shape, True)
