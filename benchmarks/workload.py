"""What the benchmarks run on: full-size models with random weights, pictures like photographs, real caption lengths."""

import io
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from encoders.openai_clip import import_clip
from models.checkpoint import save_torch
from models.clip_caption import build_captioner
from models.language import build_language_model
from models.settings import CaptionConfig, DecodingConfig
from utils.files import sha256, write_json

# how many of COCO's val2014 captions have 7, 8, ... tokens of a byte-level BPE of 34,000 entries trained on them
CAPTION_LENGTHS = (
    11, 8202, 32262, 41388, 39830, 29452, 19784, 12146, 7156, 4308, 2548, 1665, 1126, 734, 549, 356, 256, 220, 145,
    98, 73, 52, 45, 38, 33, 20, 20, 14, 12, 10, 16, 8, 7, 5, 8, 3, 6, 9, 1, 4, 7, 5, 6, 1, 3, 2, 3, 4, 0, 1, 0, 1, 0, 1,
)  # fmt: skip
SHORTEST = 7  # tokens that the first count is for
VIT_B_32 = {
    "embed_dim": 512, "image_resolution": 224, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 32,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8,
    "transformer_layers": 12,
}  # fmt: skip
GPT2 = {}  # what differs from GPT-2 124M: nothing, unless shrunk
PREFIX = 10
END, VOCABULARY = "<|endoftext|>", 50257  # of GPT-2
DECODING = DecodingConfig(entry_length=20, stop_token="")  # of captioners that are written to files
PHOTO_SIDES = (640, 480)
PHOTO_QUALITY = 90


def shrink():
    """Make the models small, to see quickly that everything runs."""
    GPT2.update(n_layer=2, n_embd=64, n_head=2)
    VIT_B_32.update(vision_layers=1, vision_width=64, transformer_width=64, transformer_heads=1, transformer_layers=1)


def caption_lengths(count, seed=0):
    """Return [count] caption lengths in tokens, as COCO's are distributed."""
    shares = np.array(CAPTION_LENGTHS) / sum(CAPTION_LENGTHS)
    return np.random.default_rng(seed).choice(len(shares), count, p=shares) + SHORTEST


def language_model(name="gpt2", ours=True):
    """Return GPT-2 124M or OPT-125M with random weights.

    Args:
        name: `gpt2` or `opt`.
        ours: as models/language.py builds it; else as transformers does.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(GPT2 if name == "gpt2" else {}))
    return build_language_model(config) if ours else AutoModelForCausalLM.from_config(config).eval()


def captioner(mapping_type, gpt, frozen):
    """Return a captioner of the predecessor's size around a language model, 512 wide embeddings."""
    torch.manual_seed(0)
    size = {"prefix_length": PREFIX} if mapping_type == "mlp" else {"prefix_length": 40, "prefix_length_clip": 40}
    return build_captioner(CaptionConfig(prefix_dim=512, mapping_type=mapping_type, only_prefix=frozen, **size), gpt)


def write_clip(path):
    """Write a ViT-B/32 with random weights as a state dict that `clip.load` reads."""
    torch.manual_seed(0)
    torch.save(import_clip().model.CLIP(**VIT_B_32).half().state_dict(), path)


def write_photos(folder, count, seed=0):
    """Write pictures with a photograph's size, smooth areas, edges and grain; returns their paths."""
    rng, paths = np.random.default_rng(seed), []
    width, height = PHOTO_SIDES
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.BICUBIC), dtype=np.int16)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        pixels[top : top + height // 3, left : left + width // 3] += rng.integers(-90, 90, 3, dtype=np.int16)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        paths.append(Path(folder) / f"{number:06d}.jpg")
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=PHOTO_QUALITY)
        paths[-1].write_bytes(encoded.getvalue())
    return paths


def write_tar(path, members):
    """Write a tar of (name, bytes) pairs; returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tokenizer(folder):
    """Write a tokenizer of GPT-2's size: bytes, pairs of bytes, and the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in letters for second in letters][: VOCABULARY - len(letters) - 1]
    words = [*letters, *map("".join, pairs), END]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END).save_pretrained(folder)


def write_captioner(folder):
    """Write an MLP, a GPT-2 and a ViT-B/32 of full size with random weights; returns the checkpoint."""
    write_clip(folder / "clip.pt")
    write_tokenizer(folder / "gpt2")
    gpt = language_model(ours=False)
    gpt.save_pretrained(folder / "gpt2")
    model = captioner("mlp", gpt, True)
    model.config.language_model, model.config.clip_model_type = str(folder / "gpt2"), str(folder / "clip.pt")
    model.config.clip_sha256 = sha256(folder / "clip.pt")
    save_torch(folder / "captioner.pt", model.state_dict())
    described = {"model": model.config.to_dict(), "language_model_config": gpt.config.to_dict()}
    write_json(folder / "captioner.json", described | {"format": 1, "decoding": asdict(DECODING)})
    return folder / "captioner.pt"
