"""What all image encoders have in common.

Axes: B batch, D width of an embedding, K tokens of an image, R input resolution, N texts.
"""

import sys

import torch

from utils.cli import note
from utils.precision import pick_dtype

POOLED, PATCHES = "pooled", "patches"


class ImageEncoder:
    """Preprocessed images -> embeddings; a family's class loads the model and says how one batch is embedded.

    Attributes:
        name: as --clip_model_type gave it. sha256: of its weights' file, None where there is no such file.
        preprocess: function of an RGB PIL image to [3, R, R] pixels.
        tokens: `pooled` or `patches`. shape: of an image's embedding, (D,) or (K, D). embed_dim: D.
        grid: (rows, columns) that an image's patches lie in, None where they lie in none.
        dtype: `fp32`, `bf16`, `int8`, or None for the weights' own.
        has_texts: whether it embeds texts beside images.
    """

    has_texts = False
    tag = None  # which of an architecture's published weights
    grid = None

    def __init__(self, name, device, dtype, tokens):
        """Note what is asked for; arguments as those of `load_encoder`.

        Raises: ValueError for a number type that the device does not have.
        """
        self.name, self.device = str(name), torch.device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.tokens = tokens or POOLED
        self.most = sys.maxsize  # images at a time, as far as is known

    @property
    def embed_dim(self):
        """Width D of a vector."""
        return self.shape[-1]

    def _embed(self, pixels):
        """Embed a batch [B, 3, R, R] on the device; returns [B, *shape]."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Embed preprocessed images; from one that does not fit the device's memory on, in halves of it.

        Args:
            pixels: [B, 3, R, R], as `preprocess` makes them.
        Returns: [B, *shape] float32 on the CPU, not normalised.
        """
        embeddings, done = [torch.empty(0, *self.shape)], 0
        while done < len(pixels):
            batch = pixels[done : done + self.most]
            try:
                embeddings.append(self._embed(batch.to(self.device, non_blocking=True)).float().cpu())
                done += len(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # here, not above: the error, while it is handled, keeps the tensors that filled the memory
            self.most = len(batch) // 2
            note(f"warning: {len(batch)} images do not fit the device's memory; going on with {self.most} at a time")
            torch.cuda.empty_cache()
        return torch.cat(embeddings) if len(embeddings) != 2 else embeddings[1]

    def check_texts(self, what):
        """Refuse what compares images with texts where this encoder cannot.

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
        """Return what tells this encoder's embeddings from another's.

        A name that stands for one file says no hash; stores of before it was recorded go on.
        """
        same = {"name": self.name, "sha256": self._identity_sha256(), "embed_dim": self.embed_dim}
        if self.tokens != POOLED:
            same |= {"tokens": self.tokens}
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
        """Return what an image goes through, as a dictionary: size, crop, interpolation, mean, std."""
        told = {}
        for step in self.preprocess.transforms:
            kind = type(step).__name__
            if kind == "Resize":
                told |= {"size": step.size, "interpolation": step.interpolation.value}
            elif kind == "CenterCrop":
                told["crop"] = list(step.size)
            elif kind == "Normalize":
                told |= {name: torch.as_tensor(getattr(step, name)).tolist() for name in ("mean", "std")}
        return told
