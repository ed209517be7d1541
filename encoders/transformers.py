"""Vision towers of transformers: `hf:ORG/REPO`, `hf:FOLDER`.

Axes: B batch, D width, K patches or queries, N texts.
"""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL.Image import Resampling
from torchvision.transforms import InterpolationMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Blip2VisionModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionModel,
)

from encoders.base import ImageEncoder, Published, quiet
from encoders.names import PATCHES, POOLED, folder_sha256
from utils.files import reason
from utils.hub import cached_first

BLIP2 = "blip-2"
NO_CODE = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run a repository's code
BOTH_TOWERS = ("clip", "siglip")
VISION_ONLY = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit")
VARIABLE = ("siglip2", "siglip2_vision_model")  # NaFlex; SigLIP 2 of a fixed size calls itself siglip


class Transformers(ImageEncoder):
    """A vision tower of transformers, with its text tower where it has one; or BLIP-2's Q-Former."""

    def __init__(self, name, device="cpu", dtype=None, tokens=None):
        """Load the encoder.

        `pooled` is the projected class token of a CLIP, a SigLIP's attention pooling, a DINO's normed class token;
        `patches` are the last layer's tokens after the tower's last norm, without class and register tokens. A BLIP-2
        gives the outputs of its Q-Former's queries, [32, 768], and nothing pooled.

        Args:
            name: `hf:` and a repository or a folder of transformers.
            device, dtype, tokens: see `load_encoder`.
        Raises: ValueError for a model of another kind, inputs of variable size, weights of another model, or `pooled`
            of a BLIP-2; FileNotFoundError where the model is not on disk and cannot be fetched.
        """
        source = str(name).partition(":")[2]
        config = _read(source, name, lambda: AutoConfig.from_pretrained(source, **NO_CODE))
        self.kind = config.model_type
        self._check_kind(name, tokens)
        super().__init__(name, device, dtype, tokens or (PATCHES if self.kind == BLIP2 else None))
        self.vision = getattr(config, "vision_config", config)
        stored = "auto" if self.device.type != "cpu" and self.dtype is None else torch.float32
        model, processor, self.tokenizer, missing = _read(
            source, name, lambda: _load(source, self.kind, self.tokens == POOLED, stored)
        )
        if missing:
            raise ValueError(f"--clip_model_type {name}: its weights are another model's, they lack {missing[0]}")
        self.has_texts = self.tokenizer is not None
        side = self.vision.image_size
        side = (side, side) if isinstance(side, int) else tuple(side)
        self.grid = tuple(length // self.vision.patch_size for length in side)
        self._take(model, Processor(processor), _pixels(processor, side))
        if self.kind == BLIP2:  # queries form no grid
            self.grid = None
        folder = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
        self.sha256 = folder_sha256(folder)

    def _check_kind(self, name, tokens):
        """Refuse a kind of model that is not supported; raises ValueError."""
        if self.kind in VARIABLE:
            raise ValueError(
                f"--clip_model_type {name} takes inputs of variable size (NaFlex): use a SigLIP 2 of a fixed size"
            )
        if self.kind not in (BLIP2, *BOTH_TOWERS, *VISION_ONLY):
            known = ", ".join((*BOTH_TOWERS, *VISION_ONLY, BLIP2))
            raise ValueError(f"--clip_model_type {name} is a {self.kind}, none of {known}")
        if self.kind == BLIP2 and tokens == POOLED:
            raise ValueError(f"--tokens pooled: {name} is a BLIP-2, whose queries are not pooled; leave --tokens out")

    def _embed(self, pixels):
        if self.kind == BLIP2:
            return self._queries(pixels)
        tower = self.model.vision_model if hasattr(self.model, "vision_model") else self.model
        out = tower(pixel_values=pixels)
        if self.tokens == POOLED:
            projection = getattr(self.model, "visual_projection", None)
            return out.pooler_output if projection is None else projection(out.pooler_output)
        tokens = out.last_hidden_state
        if self.kind in ("siglip", "siglip_vision_model"):  # without a class token
            return tokens
        if self.kind in ("clip", "clip_vision_model"):  # transformers norms the class token alone
            tokens = tower.post_layernorm(tokens)
        return tokens[:, 1 + getattr(self.vision, "num_register_tokens", 0) :]

    def _queries(self, pixels):
        """Return the outputs [B, K, D] of the Q-Former's queries, which BLIP-2 gives its language model."""
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
        mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        queries = self.model.query_tokens.expand(len(seen), -1, -1)
        out = self.model.qformer(query_embeds=queries, encoder_hidden_states=seen, encoder_attention_mask=mask)
        return out.last_hidden_state

    def _embed_texts(self, texts):
        # a SigLIP was trained on texts of one length, padding included
        padding = "max_length" if self.kind == "siglip" else True
        tokens = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._context(), return_tensors="pt"
        )
        masks = {} if self.kind == "siglip" else {"attention_mask": tokens.attention_mask.to(self.device)}
        out = self.model.get_text_features(input_ids=tokens.input_ids.to(self.device), **masks)
        return out if isinstance(out, torch.Tensor) else out.pooler_output  # depends on the version of transformers

    def _context(self):
        """Return how many tokens the text tower reads."""
        return self.model.config.text_config.max_position_embeddings

    def count_cut(self, texts):
        """Return how many texts are longer than the text tower reads."""
        return sum(len(self.tokenizer(text, verbose=False).input_ids) > self._context() for text in texts)

    def preprocessing(self):
        """Return the preprocessing as a dictionary."""
        processor = self.preprocess.processor
        size = {name: length for name, length in dict(processor.size).items() if length}
        described = {"size": size, "interpolation": InterpolationMode[Resampling(processor.resample).name].value}
        if getattr(processor, "do_center_crop", None):
            described["crop"] = [processor.crop_size["height"], processor.crop_size["width"]]
        return described | {"mean": list(processor.image_mean), "std": list(processor.image_std)}


class Processor:
    """A transformers image processor as a function of one image."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image):
        """Return the pixels [3, R, R] of an RGB PIL image."""
        return self.processor(images=image, return_tensors="pt").pixel_values[0]


def _pixels(processor, side):
    """Return the (rows, columns) of a processor's output; `side` where its configuration does not say."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    rows, columns = size["height"], size["width"]
    return (rows, columns) if rows and columns else side


def _load(source, kind, pooled, dtype):
    """Load (model, image processor, tokenizer or None, names of missing weights).

    Args:
        source: repository or folder. kind: its model_type.
        pooled: whether projection and text tower are wanted.
        dtype: torch dtype, or `auto`.
    """
    tokenizer = _tokenizer(source) if pooled and kind in BOTH_TOWERS else None
    model_class = AutoModel
    if kind == BLIP2:
        model_class = Blip2VisionModelWithProjection
    elif kind in BOTH_TOWERS and not pooled:
        model_class = CLIPVisionModel if kind == "clip" else SiglipVisionModel
    elif kind == "clip_vision_model":
        names = AutoConfig.from_pretrained(source, **NO_CODE).architectures or ()
        model_class = CLIPVisionModelWithProjection if "CLIPVisionModelWithProjection" in names else CLIPVisionModel
    model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **NO_CODE)
    unused = ("vision_projection.",) if kind == BLIP2 else ()  # which only BLIP-2s for image-text matching have
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    return model, AutoImageProcessor.from_pretrained(source, **NO_CODE), tokenizer, missing


def _tokenizer(source):
    """Load the tokenizer of a text tower; None where there is none, or an empty one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer("a photo", add_special_tokens=False).input_ids else None


def _read(source, name, read):
    """Call a function that reads a repository or folder; raises ValueError or FileNotFoundError where it cannot."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--clip_model_type {name}: {source} holds no config.json, as transformers writes it")
    try:
        with quiet():
            return read() if folder.is_dir() else cached_first(read)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if folder.is_dir():
            raise ValueError(f"--clip_model_type {name} cannot be loaded ({reason(error)})") from None
        raise FileNotFoundError(
            f"--clip_model_type {name}: {source} is neither a folder nor in the local cache, and the hub gave no such "
            f"model ({reason(error)}): check the name, or pass hf:FOLDER"
        ) from None


# repository -> width of a pooled embedding, tokens, width of a token, resolution, whether there is a text tower
PUBLISHED = {
    "google/siglip-base-patch16-224": (768, 196, 768, 224, True),
    "google/siglip-base-patch16-384": (768, 576, 768, 384, True),
    "google/siglip-large-patch16-256": (1024, 256, 1024, 256, True),
    "google/siglip-so400m-patch14-384": (1152, 729, 1152, 384, True),
    "google/siglip2-base-patch16-224": (768, 196, 768, 224, True),
    "google/siglip2-large-patch16-256": (1024, 256, 1024, 256, True),
    "google/siglip2-so400m-patch14-384": (1152, 729, 1152, 384, True),
    "facebook/dinov2-small": (384, 256, 384, 224, False),
    "facebook/dinov2-base": (768, 256, 768, 224, False),
    "facebook/dinov2-large": (1024, 256, 1024, 224, False),
    "facebook/dinov2-giant": (1536, 256, 1536, 224, False),
    "openai/clip-vit-base-patch32": (512, 49, 768, 224, True),
    "openai/clip-vit-base-patch16": (512, 196, 768, 224, True),
    "openai/clip-vit-large-patch14": (768, 256, 1024, 224, True),
    "Salesforce/blip2-opt-2.7b": (None, 32, 768, 224, False),
    "Salesforce/blip2-itm-vit-g": (None, 32, 768, 224, False),
}


def published(word):
    """Yield a Published for every repository of PUBLISHED that contains `word`; others of their kinds work too."""
    for name, shape in PUBLISHED.items():
        if word in f"hf:{name}":
            yield Published(f"hf:{name}", *shape)
