"""Exported captioners behind the interface of `Captioner`: runtime/ computes, without torch.

Axes: B images, D width of an embedding, K its tokens, R input resolution.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

from models.captioner import Captioner
from models.decoding import Caption
from models.settings import DecodingConfig

ROOT = Path(__file__).resolve().parent.parent


def runtime():
    """Return the package of runtime/, installed or not; raises ValueError where a package that it needs is missing."""
    for package in ("onnxruntime", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'exported captioners need the package {package}: pip install -e ".[export]"')
    if str(ROOT / "runtime") not in sys.path:
        sys.path.append(str(ROOT / "runtime"))
    return importlib.import_module("clipcap_runtime")


class ExportedCaptioner(Captioner):
    """A `Captioner` without explanations and reranking, which need access to the weights."""

    explains = False

    def __init__(self, folder):
        """Load a folder that export.py wrote; raises ValueError where it is incomplete or of another version."""
        self.runtime = runtime().Captioner(folder, torch.get_num_threads())
        self.decoding = DecodingConfig.from_dict(self.runtime.config["decoding"], Path(folder) / "captioner.json")
        self.encoder = ExportedEncoder(self.runtime)

    def caption_embeddings(self, clip_embedding, decoding, keys=None):
        """Caption embeddings [B, D] or [B, K, D]; returns per image a list of Caption, best first."""
        names = importlib.import_module("clipcap_runtime.captioner").SETTINGS
        settings = {name: getattr(decoding, name) for name in names}
        groups = self.runtime.caption_embeddings(clip_embedding.numpy(), keys, **settings)
        return [[Caption(found.tokens, found.logprob, found.text) for found in group] for group in groups]


class ExportedEncoder:
    """The part of an `ImageEncoder` that captioning needs."""

    compares_texts, device = False, torch.device("cpu")

    def __init__(self, captioner):
        """Take a `clipcap_runtime.Captioner`."""
        self.graph = captioner.encoder
        self.preprocess = lambda image: torch.from_numpy(captioner.preprocess(image))

    def encode_images(self, pixels):
        """Embed pixels [B, 3, R, R]; returns [B, D] or [B, K, D]."""
        return torch.from_numpy(self.graph.run(None, {"pixels": pixels.numpy()})[0])
