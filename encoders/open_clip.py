"""open_clip's architectures: `open_clip:ARCH/TAG`, `open_clip:ARCH/FILE`, `hf-hub:ORG/REPO`, `local-dir:FOLDER`.

Axes: B batch, D width, K patches, N texts.
"""

import functools
import zipfile
from pathlib import Path

import open_clip
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.model import CLIPVisionCfg
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2

from encoders.base import RESNET_STRIDE, ImageEncoder, Published, plain_steps, quiet
from encoders.names import POOLED, folder_sha256
from encoders.timm import patch_grid, patch_tokens
from encoders.timm import shape_of as timm_shape
from utils.cli import nearest, note
from utils.files import reason, sha256
from utils.hub import cached_first

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # settings that a tag may override


class OpenClip(ImageEncoder):
    """A model of open_clip, with its text tower."""

    has_texts = True

    def __init__(self, name, device="cpu", dtype=None, tokens=None):
        """Load the encoder.

        `patches` are the last layer's tokens as pooling receives them, as wide as the tower: after the last norm where
        that precedes pooling, before attention pooling and projection, without the class token.

        Args:
            name: one of the forms above; TAG is one that open_clip lists for ARCH.
            device, dtype, tokens: see `load_encoder`.
        Raises: ValueError for an unknown architecture or tag, or weights of another model; FileNotFoundError where
            the weights are not on disk and cannot be fetched.
        """
        super().__init__(name, device, dtype, tokens)
        form, _, rest = self.name.partition(":")
        if form == "open_clip":
            arch, _, weights = rest.partition("/")
            path, options = self._published(arch, weights) if not Path(weights).is_file() else _own(arch, Path(weights))
            self.source, options["pretrained"] = arch, str(path)
        else:
            path, options = _folder_or_repository(self.name, form, rest), {"require_pretrained": True}
            self.source = self.name
        model = _build(self.source, path, options)
        visual = model.visual
        config = PreprocessCfg(**visual.preprocess_cfg)
        self.visual = visual.trunk if isinstance(visual, TimmModel) else visual
        self.grid = patch_grid(self.visual) or getattr(visual, "grid_size", None)
        if isinstance(visual, ModifiedResNet):
            self.grid = (visual.image_size // RESNET_STRIDE,) * 2
        size = config.size if isinstance(config.size, tuple | list) else (config.size, config.size)
        self._take(model, plain_steps(image_transform_v2(config, is_train=False)), size)
        self.sha256 = folder_sha256(rest) if form == "local-dir" else sha256(path)

    def _published(self, arch, tag):
        """Return (weights file, options for `open_clip.create_model`) of a tag."""
        config = _tag(arch, tag)
        self.tag = tag
        try:
            with quiet():
                path = cached_first(lambda: open_clip.download_pretrained(config))
        except (OSError, ValueError, RuntimeError) as error:
            raise FileNotFoundError(
                f"--clip_model_type {self.name}: its weights are not in the cache and cannot be fetched "
                f"({reason(error)}): check the network, or pass open_clip:{arch}/FILE"
            ) from None
        preprocessing = {key: config[key] for key in PREPROCESSING if key in config}
        return path, {"force_quick_gelu": bool(config.get("quick_gelu")), "force_preprocess_cfg": preprocessing}

    def _embed(self, pixels):
        if self.tokens == POOLED:
            return self.model.encode_image(pixels, normalize=False)
        visual = self.model.visual
        if isinstance(visual, TimmModel):
            return patch_tokens(visual.trunk, visual.trunk.forward_features(pixels), self.name)
        late = getattr(visual, "attn_pool", None) is not None or getattr(visual, "final_ln_after_pool", False)
        [tokens] = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=not late, intermediates_only=True
        )["image_intermediates"]
        return tokens.flatten(2).transpose(1, 2)  # [B, D, rows, columns]

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of the text tower, which may have to be fetched.

        Raises: FileNotFoundError where it is not in the cache and cannot be fetched.
        """
        try:
            with quiet():
                return cached_first(lambda: open_clip.get_tokenizer(self.source))
        except (OSError, ValueError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the tokenizer of {self.name} is not in the cache and cannot be fetched ({reason(error)})"
            ) from None

    def check_texts(self, what):
        """Refuse texts as ImageEncoder does, and where the tokenizer cannot be loaded."""
        super().check_texts(what)
        self.tokenizer  # noqa: B018  fetched before the work begins

    def _embed_texts(self, texts):
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=False)

    def count_cut(self, texts):
        """Return how many texts are longer than the text tower reads."""
        return sum(_length(self.tokenizer, text) > self.tokenizer.context_length for text in texts)


def _length(tokenizer, text):
    """Return how many tokens open_clip's tokenizer gives a text, begin and end tokens included."""
    inner = getattr(tokenizer, "tokenizer", None)
    return len(tokenizer.encode(text)) + 2 if inner is None else len(inner(tokenizer.clean_fn(text)).input_ids)


def _check_architecture(arch):
    """Raise ValueError for an architecture that open_clip does not have."""
    if open_clip.get_model_config(arch) is None:
        raise ValueError(
            f"--clip_model_type open_clip:{arch}: open_clip knows no such architecture"
            f"{nearest(arch, open_clip.list_models())}"
        )


def _tag(arch, tag):
    """Return open_clip's configuration of a published tag; raises ValueError where it does not suit `arch`."""
    _check_architecture(arch)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    config = open_clip.get_pretrained_cfg(arch, tag)
    if not config:
        others = [other for other in open_clip.list_pretrained_models_by_tag(tag) if other != arch] if tag else []
        hint = f"; it is one of {', '.join(others[:3])}" if others else nearest(tag, tags)
        raise ValueError(
            f"--clip_model_type open_clip:{arch}/{tag} is neither a file nor a tag of {arch}, which has "
            f"{', '.join(tags) or 'none'}{hint}"
        )
    if open_clip.get_model_config(arch).get("quick_gelu") and not config.get("quick_gelu"):
        raise ValueError(
            f"--clip_model_type open_clip:{arch}/{tag}: {arch} computes QuickGELU, {tag} was trained with GELU; take "
            f"the architecture without -quickgelu"
        )
    return config


def _own(arch, path):
    """Return (weights file, options for `open_clip.create_model`) of a user's file, inferred from `arch`'s tags.

    Raises: ValueError for a file of OpenAI's, or one known to need another activation than the architecture computes.
    """
    _check_architecture(arch)
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"{path} is a TorchScript archive, as OpenAI's files are: pass --clip_model_type {path}")
    plain = arch.removesuffix("-quickgelu")
    published = [open_clip.get_pretrained_cfg(plain, tag) for tag in open_clip.list_pretrained_tags_by_model(plain)]
    alike = [key for key in PREPROCESSING if len({str(config.get(key)) for config in published}) == 1]
    options = {"force_preprocess_cfg": {key: published[0][key] for key in alike if key in published[0]}}
    computes = bool(open_clip.get_model_config(arch).get("quick_gelu"))
    needs = {bool(config.get("quick_gelu")) for config in published}
    if needs - {computes}:
        digest = sha256(path)
        known = {bool(config.get("quick_gelu")) for config in published if _is_of(digest, config)}
        if computes and False in known:
            raise ValueError(f"{path} was trained with GELU, {arch} computes QuickGELU: take open_clip:{plain}/{path}")
        if not known:
            note(
                f"warning: {path} does not say whether it was trained with QuickGELU, as OpenAI's, MetaCLIP's and "
                f"DFN's were; {arch} {'computes' if computes else 'does not compute'} it: are they of one kind?"
            )
        options["force_quick_gelu"] = computes or True in known
    return path, options


def _is_of(digest, config):
    """Tell whether a published tag's URL contains a file's SHA-256, or the start of it."""
    words = config.get("url", "").replace(".", "-").replace("/", "-").split("-")
    return any(len(word) >= 8 and digest.startswith(word) for word in words)


def _folder_or_repository(name, form, rest):
    """Return the weights file of a folder or a repository; raises FileNotFoundError where it cannot be had."""
    if form == "local-dir":
        if not (Path(rest) / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"--clip_model_type {name}: {rest} holds no open_clip_config.json")
        with quiet():
            path = _find_checkpoint_in_dir(Path(rest))
        if path is None:
            raise FileNotFoundError(f"--clip_model_type {name}: {rest} holds no file of weights")
        return path
    try:
        with quiet():
            cached_first(lambda: download_pretrained_from_hf(rest, filename="open_clip_config.json"))
            return cached_first(lambda: download_pretrained_from_hf(rest))
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"--clip_model_type {name} is not in the cache and cannot be fetched ({reason(error)}): check the name "
            f"and the network, or pass local-dir:FOLDER"
        ) from None


def _build(source, path, options):
    """Build a model with the weights of a file; raises ValueError where they are another model's."""
    try:
        with quiet():
            return cached_first(lambda: open_clip.create_model(source, **options))
    except Exception as error:  # converting other formats can raise anything
        raise ValueError(f"{path} holds no weights of {source} ({reason(error)})") from None


@functools.cache
def shape_of(arch):
    """Return (width, patches, width of a patch, resolution) of an architecture, read from its configuration."""
    config = open_clip.get_model_config(arch)
    vision = vars(CLIPVisionCfg()) | config["vision_cfg"]
    resolution = vision["image_size"]
    if vision["timm_model_name"]:
        width, reduction, _ = timm_shape(vision["timm_model_name"])
        patches = reduction and (resolution // reduction) ** 2
    elif isinstance(vision["layers"], list):
        width, patches = vision["width"] * RESNET_STRIDE, (resolution // RESNET_STRIDE) ** 2
    else:
        width, patches = vision["width"], (resolution // vision["patch_size"]) ** 2
    return config["embed_dim"], patches, width, resolution


def published(word):
    """Yield a Published for every architecture and tag that contain `word`."""
    for arch, tag in open_clip.list_pretrained():
        if word in f"open_clip:{arch}/{tag}" and open_clip.get_model_config(arch):
            yield Published(f"open_clip:{arch}/{tag}", *shape_of(arch), True)
