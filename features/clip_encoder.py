"""Images -> CLIP embeddings, in batches.

Axes: B batch, D CLIP width, R input resolution.
"""

import pickle
import sys
import urllib.error
import warnings
from pathlib import Path

import torch

from features.loader import image_loader, slices
from utils.cli import nearest, note
from utils.files import reason, sha256
from utils.precision import pick_dtype, prepare_for_inference

CONTEXT = 77  # tokens of CLIP's text tower, the begin and the end token among them


class ClipEncoder:
    """OpenAI's CLIP with its own preprocessing."""

    def __init__(self, clip_model_type, device="cpu", dtype=None):
        """Load the encoder.

        Args:
            clip_model_type: a name of `clip.available_models()`, or the path of a CLIP `.pt` (state dict or JIT).
            device: torch device.
            dtype: `auto`, `fp32`, `bf16` or `int8`; None: float32 on the CPU, elsewhere as CLIP stores the weights.
        Raises: ValueError for a name that is neither, or a file that is no CLIP; FileNotFoundError where a named
            model is not in the cache and cannot be fetched.
        """
        clip = _import_clip()
        self.name, self.device = str(clip_model_type), torch.device(device)
        self.model, self.preprocess = _load(clip, self.name, self.device)
        # images are RGB already, and processes that read them need not import clip for that
        self.preprocess.transforms.remove(clip.clip._convert_image_to_rgb)
        self.model.eval().requires_grad_(False)
        self.dtype = pick_dtype(dtype, self.device)
        prepare_for_inference(self.model, self.dtype, self.device)
        self.tokenize = clip.tokenize
        self.input_resolution = self.model.visual.input_resolution  # R
        self.embed_dim = self.model.text_projection.shape[1]  # D
        self.sha256 = named_sha256(self.name) or sha256(self.name)
        self.most = sys.maxsize  # images at a time, as far as is known

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Embed preprocessed images; from one that does not fit the device's memory on, in halves of it.

        Args:
            pixels: [B, 3, R, R], normalised as CLIP does.
        Returns: [B, D] float32 on the CPU, not normalised.
        """
        embeddings, done = [], 0
        while done < len(pixels):
            batch = pixels[done : done + self.most]
            try:
                embeddings.append(self.model.encode_image(batch.to(self.device, non_blocking=True)).float().cpu())
                done += len(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # here, not above: the error, while it is handled, keeps the tensors that filled the memory
            self.most = len(batch) // 2
            note(f"warning: {len(batch)} images do not fit the device's memory; going on with {self.most} at a time")
            torch.cuda.empty_cache()
        return torch.cat(embeddings)

    @torch.inference_mode()
    def encode_texts(self, texts, batch_size=256):
        """Embed texts, cut to CLIP's context; returns [N, D] float32 on the CPU, not normalised.

        Texts of like lengths share a batch, which is as long as its longest: no token sees the padding that follows.
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
        long = (text for text in texts if len(text.encode()) > CONTEXT - 2)  # a token is a byte at least
        return sum(_is_cut(self.tokenize, text) for text in long)

    def identity(self):
        """Return what tells this encoder's embeddings from another's: name, sha256 of its file, width, numbers.

        A name of OpenAI's stands for one file; stores of before its hash was recorded go on.
        """
        digest = None if named_sha256(self.name) else self.sha256
        same = {"name": self.name, "sha256": digest, "embed_dim": self.embed_dim}
        return same | ({"dtype": self.dtype} if self.dtype in ("bf16", "int8") else {})

    def encode_files(self, paths, batches=64, num_workers=0):
        """Embed image files, in order.

        Args:
            paths: image files.
            batches: list of lists of indices into `paths`, one per call of the encoder; or the size of such a batch.
            num_workers: processes that read and preprocess images.
        Yields: per batch (indices into `paths`, [B, D] float32 embeddings, {index: why it could not be read}).
        """
        if isinstance(batches, int):
            batches = slices(len(paths), batches)
        loader = image_loader(paths, self.preprocess, batches, num_workers, pin_memory=self.device.type == "cuda")
        for indices, pixels, errors in loader:
            embeddings = self.encode_images(pixels) if indices else torch.empty(0, self.embed_dim)
            yield indices, embeddings, errors


def _is_cut(tokenize, text):
    """Tell whether CLIP's tokenizer, which complains of it, finds a text too long."""
    try:
        tokenize(text)
    except RuntimeError:
        return True
    return False


def _import_clip():
    """Return OpenAI's module; importing it takes a second, and not every command needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # which is not the user's to mend
        import clip
    return clip


def named_sha256(name):
    """Return the SHA-256, checked by `clip.load`, of the file that a name of OpenAI's stands for; None: no name."""
    url = _import_clip().clip._MODELS.get(str(name))
    return url.split("/")[-2] if url else None


def known_encoder(described):
    """Return what tells an encoder: its file's hash, which a name of OpenAI's has too, else its name; None: unknown.

    Args:
        described: what the json of a store or a captioner's configuration says, as a dictionary.
    """
    name = described.get("clip_model_type")
    return described.get("clip_sha256") or named_sha256(name) or name


def _load(clip, name, device):
    """Call `clip.load`, with errors that say what to do."""
    if name not in clip.available_models() and not Path(name).is_file():
        names = clip.available_models()
        hint = nearest(name, names)
        raise ValueError(f"--clip_model_type {name} is neither a file nor one of {', '.join(names)}{hint}")
    try:
        with warnings.catch_warnings():
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
