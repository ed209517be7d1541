"""The parts of the synthetic world's CLIP: words, towers, throw-away heads, loss, file."""

import io
import math
import os
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from demo.world.clip_cache import RESOLUTION
from demo.world.scenes import BACKGROUNDS, COLOURS, KINDS, RELATIONS, SIZES
from encoders.openai_clip import import_clip

clip = import_clip()
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # clip.load's preprocessing
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
EMBED_DIM = 256
CLIP_CONTEXT, CLIP_VOCABULARY = 77, 49408
EXPORT_RMS = 1.0  # of the image embedding's elements; cosines do not depend on it


# ---------------------------------------------------------------- words
class Words:
    """The few ids of clip.tokenize that captions use, renumbered 0 .. size - 1.

    Order is kept, so the end token stays the largest, which is how CLIP finds it. Id 0 is
    padding, as in clip.tokenize.
    """

    def __init__(self):
        grammar = "there is are to the left of right above over below under . , on in front a"
        words = set(grammar.split()) | set(COLOURS) | set(" ".join(BACKGROUNDS).split())
        words |= set(KINDS) | {kind + "s" for kind in KINDS}
        words |= set("one two three small little large big".split())
        pieces = {w: [i for i in clip.tokenize(w)[0].tolist() if i][1:-1] for w in sorted(words)}
        start, end = clip.tokenize("a")[0].tolist()[0::2][:2]
        self.ids = sorted({0, start, end} | {i for ids in pieces.values() for i in ids})
        new = {old: i for i, old in enumerate(self.ids)}
        self.pieces = {w: [new[i] for i in ids] for w, ids in pieces.items()}
        self.start, self.end = new[start], new[end]

    def encode(self, captions):
        """Return [B, T] ids of captions, T the longest."""
        rows = []
        for caption in captions:
            words = re.findall(r"[a-z]+|[.,]", caption.lower())
            rows.append([self.start] + [i for w in words for i in self.pieces[w]] + [self.end])
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


# ---------------------------------------------------------------- modules
def build_clip(words, context, vision, layers, width, patch=12):
    """Build the CLIP to train: OpenAI's class, with the words' small vocabulary; `patch`: pixels of a ViT's."""
    resnet = vision == "resnet"
    return clip.model.CLIP(
        embed_dim=EMBED_DIM, image_resolution=RESOLUTION,
        vision_layers=tuple(layers) if resnet else layers[0], vision_width=width,
        vision_patch_size=None if resnet else patch,
        context_length=context, vocab_size=len(words.ids),
        transformer_width=64, transformer_heads=1, transformer_layers=2,
    )  # fmt: skip


class Heads(nn.Module):
    """The throw-away heads: what the scene holds, read off the pooled image embedding by linear maps.

    One head per attribute of the first group, of the second one, of the relation and of the background. What a linear
    map reads, a captioner's small mapping network can learn to read from a few thousand pictures.
    """

    CHOICES = {"count": (1, 2, 3), "size": SIZES, "colour": COLOURS, "kind": KINDS}

    def __init__(self):
        super().__init__()
        self.names = [(role, name) for role in (0, 1) for name in self.CHOICES]
        widths = [len(self.CHOICES[name]) for _, name in self.names] + [1 + len(RELATIONS), len(BACKGROUNDS)]
        self.layers = nn.ModuleList(nn.Linear(EMBED_DIM, width) for width in widths)

    def forward(self, embedding):
        """Return per head the [B, choices] logits of image embeddings [B, D]."""
        x = F.normalize(embedding.float(), dim=-1) * math.sqrt(EMBED_DIM)
        return [layer(x) for layer in self.layers]

    def targets(self, scenes):
        """Return [heads, B] right choices, -1 where a scene has no second group."""
        rows = []
        for scene in scenes:
            row = [
                self.CHOICES[name].index(getattr(scene.groups[role], name)) if role < len(scene.groups) else -1
                for role, name in self.names
            ]
            relation = 0 if scene.relation is None else 1 + RELATIONS.index(scene.relation)
            rows.append([*row, relation, BACKGROUNDS.index(scene.background)])
        return torch.tensor(rows).T

    def loss(self, embedding, scenes):
        """Return the mean cross-entropy of all heads."""
        pairs = zip(self(embedding), self.targets(scenes), strict=True)
        return sum(F.cross_entropy(logits, right, ignore_index=-1) for logits, right in pairs) / len(self.layers)


def image_batch(pictures):
    """Return clip.load's preprocessing of uint8 [B, R, R, 3] pictures: [B, 3, R, R]."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div_(255)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (x - mean) / std


def contrastive_loss(image, text, negative, scale, meanings):
    """CLIP's loss; equal scenes in a batch are not each other's negatives.

    Args:
        image, text: [B, D] embeddings.
        negative: [B, D] embeddings of a wrong caption for each image.
        scale: logit scale, already exponentiated.
        meanings: list of B hashable scene meanings.
    Returns: scalar.
    """
    image, text, negative = (F.normalize(x.float(), dim=-1) for x in (image, text, negative))
    logits = scale * image @ text.t()
    numbers = {}
    ids = torch.tensor([numbers.setdefault(m, len(numbers)) for m in meanings])
    same = (ids[:, None] == ids[None]).fill_diagonal_(False)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(logits))
    wrong = scale * (image * negative).sum(-1, keepdim=True)  # [B, 1]
    of_image = F.cross_entropy(torch.cat([logits, wrong], 1), target)
    return (of_image + F.cross_entropy(logits.t(), target)) / 2


# ---------------------------------------------------------------- saving
def import_state_dict(state, words, context):
    """Return what `export_state_dict` wrote in the form that training uses."""
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][torch.tensor(words.ids)]
    state["positional_embedding"] = state["positional_embedding"][:context]
    return state


def export_state_dict(model, words, rms):
    """Return an fp16 state dict in clip.load's form.

    Args:
        model: the trained CLIP.
        words: its Words.
        rms: root mean square of its image embeddings; they are scaled to EXPORT_RMS.
    """
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    small = state["token_embedding.weight"]
    full = torch.zeros(CLIP_VOCABULARY, small.shape[1])
    full[torch.tensor(words.ids)] = small
    state["token_embedding.weight"] = full
    places = torch.zeros(CLIP_CONTEXT, small.shape[1])
    places[: model.context_length] = state["positional_embedding"]
    state["positional_embedding"] = places
    scaled = ["visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "visual.proj"]
    for name in scaled:
        if name in state:
            state[name] = state[name] * (EXPORT_RMS / rms)
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def save_packed(state, path):
    """Save a state dict, deflated: rows of zeros cost nothing, and torch.load reads it."""
    plain = io.BytesIO()
    torch.save(state, plain)
    partial = Path(f"{path}.part")
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    os.replace(partial, path)
