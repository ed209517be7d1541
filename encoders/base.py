"""What all image encoders have in common.

Axes: B batch, D width of an embedding, K tokens of an image, R input resolution, N texts.
"""

import contextlib
import logging
import math
import sys
import warnings
from typing import NamedTuple

import torch

from encoders.names import PATCHES, POOLED
from utils.cli import note
from utils.lean import lean
from utils.precision import pick_dtype, prepare_for_inference

with lean():
    from torchvision.transforms import Compose, ToTensor

RESNET_STRIDE = 32  # pixels per side of a cell in a ResNet's last grid
# bytes of a layer's output that a processor's cache holds, and that its allocator gives out again: above 32 MiB, glibc
# asks the system for every tensor, which fills it with zeros. Measured: a fifth more images a second.
CACHED = 20 << 20


class Published(NamedTuple):
    """What is known of an encoder by its name alone.

    Args:
        name: as --clip_model_type takes it.
        width: of a pooled embedding; None: the encoder pools nothing.
        tokens, token_width: of --tokens patches; None: unknown before the encoder is loaded.
        resolution: pixels per side.
        has_texts: whether it embeds texts beside images.
    """

    name: str
    width: int | None
    tokens: int | None
    token_width: int
    resolution: int
    has_texts: bool


class ImageEncoder:
    """Preprocessed images -> embeddings; a family's class loads the model and says how one batch is embedded.

    Attributes:
        name: as --clip_model_type gave it. sha256: of its weights' file, None where there is no such file.
        preprocess: function of an RGB PIL image to [3, R, R] pixels.
        tokens: `pooled` or `patches`. shape: of an image's embedding, (D,) or (K, D). embed_dim: D.
        grid: (rows, columns) of an image's patches, None where they form no grid.
        dtype: `fp32`, `bf16`, `int8`, or None for the weights' own.
        has_texts: whether it embeds texts beside images.
    """

    has_texts = False
    tag = None  # which of an architecture's published weights
    grid = None

    def __init__(self, name, device, dtype, tokens):
        """Store the arguments, which are those of `load_encoder`.

        Raises: ValueError for a dtype that the device does not support.
        """
        self.name, self.device = str(name), torch.device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.tokens = tokens or POOLED
        self.most = None  # images at once: as a processor's cache holds, or a GPU's memory; None: not known yet

    def _take(self, model, preprocess, resolution):
        """Take over a loaded model, prepare it for inference and find out the shape of its embeddings.

        Args:
            model: on any device; `_embed` uses it as `self.model`.
            preprocess: as the attribute.
            resolution: (rows, columns) of pixels.
        Raises: ValueError where the model does not suit --dtype or --tokens.
        """
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.preprocess, self.input_resolution = preprocess, max(resolution)
        pixels = torch.linspace(-1, 1, 3 * resolution[0] * resolution[1]).view(1, 3, *resolution)

        @torch.inference_mode()
        def probe():
            return self._embed(pixels.to(self.device, self._numbers()))

        self.shape = tuple(probe().shape[1:])
        if self.tokens == PATCHES and math.prod(self.grid or ()) != self.shape[0]:
            side = math.isqrt(self.shape[0])
            self.grid = (side, side) if side**2 == self.shape[0] else None
        prepare_for_inference(self.model, self.dtype, self.device, probe)

    def _numbers(self):
        """Return the dtype that the model takes."""
        kinds = (p.dtype for p in self.model.parameters() if p.ndim > 1 and p.is_floating_point())  # norms may differ
        return next(kinds, torch.float32)

    @property
    def embed_dim(self):
        """Width D of a vector."""
        return self.shape[-1]

    def _embed(self, pixels):
        """Embed a batch [B, 3, R, R] on the device; returns [B, *shape]."""
        raise NotImplementedError

    def _count_at_once(self, pixels):
        """Return how many images to embed at once, from one [1, 3, R, R]; a GPU takes all until its memory is full.

        The image's embedding is not kept: the parts of a batch must not depend on whether it is the first.
        """
        if self.device.type != "cpu":
            return sys.maxsize
        sizes = [1]

        def look(_module, _given, out):
            if isinstance(out, torch.Tensor):
                sizes.append(out.nbytes)

        handles = [module.register_forward_hook(look) for module in self.model.modules()]
        try:
            self._embed(pixels.to(self.device, self._numbers()))
        finally:
            for handle in handles:
                handle.remove()
        return max(1, CACHED // max(sizes))

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Embed preprocessed images; a batch that does not fit the device's memory is halved, and so are later ones.

        Args:
            pixels: [B, 3, R, R], as `preprocess` makes them.
        Returns: [B, *shape] float32 on the CPU, not normalised.
        """
        if self.most is None and len(pixels) > 1:
            self.most = self._count_at_once(pixels[:1])
        embeddings, done = [torch.empty(0, *self.shape)], 0
        while done < len(pixels):  # in parts of one size
            left = len(pixels) - done
            batch = pixels[done : done + math.ceil(left / math.ceil(left / (self.most or left)))]
            try:
                embeddings.append(self._embed(batch.to(self.device, self._numbers(), non_blocking=True)).float().cpu())
                done += len(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # not in the handler: until that ends, the error keeps the tensors that filled the memory alive
            self.most = len(batch) // 2
            note(f"warning: {len(batch)} images do not fit the device's memory; going on with {self.most} at a time")
            torch.cuda.empty_cache()
        return torch.cat(embeddings) if len(embeddings) != 2 else embeddings[1]

    @torch.inference_mode()
    def encode_texts(self, texts, batch_size=256):
        """Embed texts, cut to what the text tower reads; returns [N, D] float32 on the CPU, not normalised."""
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        return torch.cat([torch.empty(0, self.embed_dim), *(self._embed_texts(b).float().cpu() for b in batches)])

    def _embed_texts(self, texts):
        """Embed a batch of texts; returns [N, D]."""
        raise NotImplementedError

    @property
    def compares_texts(self):
        """Whether an image's embedding can be compared with a text's."""
        return self.has_texts and self.tokens == POOLED

    def check_texts(self, what):
        """Refuse a flag that compares images with texts where this encoder cannot.

        Args:
            what: the flag that asks for it.
        Raises: ValueError.
        """
        if not self.has_texts:
            raise ValueError(
                f"{what}: {self.name} has no text tower; pass a --clip_model_type that embeds texts too, as ViT-B/32 "
                f"does"
            )
        if self.tokens != POOLED:
            raise ValueError(f"{what} compares one vector an image with texts, not {self.tokens}: pass --tokens pooled")

    def identity(self):
        """Return what distinguishes this encoder's embeddings from another's.

        A name that stands for one file gets no hash, so that stores from before hashes were recorded can be resumed.
        """
        same = {"name": self.name, "sha256": self._identity_sha256(), "embed_dim": self.embed_dim}
        if self.tokens != POOLED:
            same |= {"tokens": self.tokens, "shape": list(self.shape)}
        return same | ({"dtype": self.dtype} if self.dtype in ("bf16", "int8") else {})

    def _identity_sha256(self):
        """Return the hash in `identity`."""
        return self.sha256

    def describe(self):
        """Return what the json beside a store says of its encoder."""
        described = {"clip_model_type": self.name, "clip_sha256": self.sha256, "embed_dim": self.embed_dim}
        if self.tag:
            described["clip_tag"] = self.tag
        if self.tokens != POOLED:
            described["tokens"] = self.tokens
        return described | {
            "shape": list(self.shape), "grid": self.grid and list(self.grid), "dtype": self.dtype,
            "preprocessing": self.preprocessing(), "text_tower": self.has_texts,
        }  # fmt: skip

    def preprocessing(self):
        """Return the preprocessing as a dictionary: size, crop, interpolation, mean, std."""
        described = {}
        for step in self.preprocess.transforms:
            kind = type(step).__name__
            if kind == "Resize":
                described |= {"size": step.size, "interpolation": step.interpolation.value}
            elif kind == "CenterCrop":
                described["crop"] = list(step.size)
            elif kind == "Normalize":
                described |= {name: torch.as_tensor(getattr(step, name)).tolist() for name in ("mean", "std")}
            elif kind != "ToTensor":
                described[kind] = str(step)
        return described


def plain_steps(preprocess):
    """Return a library's Compose with torchvision's classes in place of its own, so that workers import less."""
    steps = []
    for step in preprocess.transforms:
        if type(step).__name__ == "MaybeToTensor":
            steps.append(ToTensor())
        elif type(step).__name__ not in ("MaybeConvertMode", "function"):  # images are RGB already
            steps.append(step)
    return Compose(steps)


@contextlib.contextmanager
def quiet():
    """Silence libraries' logs and warnings: our own error says in one line what went wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
