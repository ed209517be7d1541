"""Train a small ViT CLIP, whose patches stay readable, and a GPT-2 on scenes of one to six objects.

CLIP's contrastive loss teaches a ViT's pooled vector; its patches are only asked to serve that. Two heads are trained
beside it and thrown away: one reads off the pooled vector which objects there are, so that it holds as many as it can,
one off each patch which object its cell holds. Both encoders of demo.tokens are this one tower.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel

from demo.world.clip_cache import RESOLUTION
from demo.world.clip_parts import Words, build_clip, contrastive_loss, export_state_dict, image_batch, save_packed
from demo.world.crowded import SIDE, caption_crowded, split_scenes
from demo.world.scenes import COLOURS, KINDS, SIZES
from demo.world.train_gpt2 import make_sequence, pad_rows

WIDTH, LAYERS, PATCH = 128, 4, 16  # 6 x 6 patches, 2 x 2 to a cell of the grid
CONTEXT = 48  # tokens of the longest caption
HEADS_WEIGHT = 4.0
SHARE_HELD_OUT = 0.05


class CrowdedHeads(nn.Module):
    """What is where, by linear maps: off the pooled vector which objects there are, off a patch which one is there."""

    def __init__(self, embed_dim):
        super().__init__()
        self.present = nn.Linear(embed_dim, len(COLOURS) * len(KINDS))
        self.patch = nn.ModuleList(nn.Linear(WIDTH, 1 + len(names)) for names in (SIZES, COLOURS, KINDS))

    def loss(self, pooled, patches, present, there):
        """Return the sum of both heads' losses.

        Args:
            pooled: [B, D]. patches: [B, K, WIDTH].
            present: [B, looks] 1 where an object of this colour and kind is in the picture.
            there: [3, B, K] size, colour, kind of the object in each patch's cell, 0 where it is empty.
        """
        scaled = F.normalize(pooled.float(), dim=-1) * math.sqrt(pooled.shape[-1])
        seen = F.binary_cross_entropy_with_logits(self.present(scaled), present)
        read = [
            F.cross_entropy(head(patches.float()).flatten(0, 1), place.flatten())
            for head, place in zip(self.patch, there, strict=True)
        ]
        return seen + sum(read) / 3


def targets(scenes):
    """Return (present, there) of scenes, for CrowdedHeads."""
    side = RESOLUTION // PATCH
    of_side = np.arange(side) * SIDE // side
    cell = (of_side[:, None] * SIDE + of_side).ravel()  # [K] cell that a patch lies in
    present, there = torch.zeros(len(scenes), len(COLOURS) * len(KINDS)), torch.zeros(3, len(scenes), len(cell))
    for row, scene in enumerate(scenes):
        for group, place in zip(scene.groups, scene.cells, strict=True):
            present[row, COLOURS.index(group.colour) * len(KINDS) + KINDS.index(group.kind)] = 1
            looks = SIZES.index(group.size), COLOURS.index(group.colour), KINDS.index(group.kind)
            for number, look in enumerate(looks):
                there[number, row, cell == place] = 1 + look
    return present, there.long()


def embed(model, pixels):
    """Return a ViT CLIP's ([B, D] pooled vector, [B, K, WIDTH] patches after its last norm)."""
    seen, visual = [], model.visual
    handle = visual.transformer.register_forward_hook(lambda _module, _given, out: seen.append(out))
    try:
        pooled = model.encode_image(pixels)
    finally:
        handle.remove()
    return pooled, visual.ln_post(seen[0].transpose(0, 1)[:, 1:])


def warm_up_and_fall(step, steps):
    """Return the share of the peak learning rate at a step: a tenth of them warms up, then a cosine falls to zero."""
    return min(1, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def read_pictures(folder, rows):
    """Return the written pictures of `split_scenes`' rows as CLIP sees them, uint8 [N, R, R, 3]."""
    pictures = []
    for image_id, _, _ in rows:
        with Image.open(Path(folder) / f"{image_id:06d}.jpg") as image:
            pictures.append(np.asarray(image.resize((RESOLUTION, RESOLUTION), Image.BICUBIC)))
    return np.stack(pictures)


def train_clip(scenes, folder, epochs, path, bs=64, lr=1e-3, seed=0):
    """Train the CLIP on the first scenes of the train split and write it as `clip.load` reads it.

    Args:
        scenes: how many, a few of which are held out. folder: of their pictures. epochs: passes over them.
        path: file to write. bs: pictures a step. lr: peak learning rate. seed: of weights and order.
    Returns: of the held-out pictures' patches in cells with objects, the share off which colour and kind are read.
    """
    torch.manual_seed(seed)
    rows = split_scenes("train", scenes)
    pictures, words = read_pictures(folder, rows), Words()
    model = build_clip(words, CONTEXT, "vit", [LAYERS], WIDTH, PATCH).float()
    heads = CrowdedHeads(model.text_projection.shape[1])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    held_out = max(bs, round(SHARE_HELD_OUT * scenes))
    steps = epochs * ((scenes - held_out) // bs)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_fall(step, steps))
    rng = np.random.default_rng(seed)
    for step in range(steps):
        within = step % ((scenes - held_out) // bs)
        if within == 0:
            order = rng.permutation(scenes - held_out)
        batch = order[within * bs : (within + 1) * bs]
        shown = [rows[i][1] for i in batch]
        tokens = words.encode([caption_crowded(scene, rng) for scene in shown])
        tokens = F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
        with torch.autocast("cpu", torch.bfloat16):
            pooled, patches = embed(model, image_batch(pictures[batch]))
            texts = model.encode_text(tokens)
        contrast = contrastive_loss(pooled, texts, texts.roll(1, 0), model.logit_scale.exp(), shown)
        loss = contrast + HEADS_WEIGHT * heads.loss(pooled, patches, *targets(shown))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 100 == 0:
            print(f"step {step} of {steps}: contrast {contrast.item():.3f}, loss {loss.item():.3f}", flush=True)
    shown = [scene for _, scene, _ in rows[-held_out:]]
    return _save(model.eval(), heads, words, pictures[-held_out:], shown, path)


@torch.no_grad()
def _save(model, heads, words, pictures, scenes, path):
    """Write the CLIP; returns what `train_clip` does."""
    parts = [embed(model, image_batch(pictures[start : start + 256])) for start in range(0, len(pictures), 256)]
    pooled, patches = (torch.cat(part) for part in zip(*parts, strict=True))
    _, there = targets(scenes)
    right = torch.ones_like(there[0], dtype=torch.bool)
    for head, place in zip(heads.patch[1:], there[1:], strict=True):
        right &= head(patches).argmax(-1) == place
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_packed(export_state_dict(model, words, pooled.pow(2).mean().sqrt().item()), path)
    return right[there[0] > 0].float().mean().item()


def train_language_model(scenes, steps, source, path, bs=64, lr=1e-3, seed=0):
    """Teach the world's GPT-2 to say a list of objects as a sentence, and write its folder.

    Args:
        scenes: of the train split. steps: optimiser steps.
        source: folder to begin with. path: folder to write. bs, lr, seed: as of `train_clip`.
    Returns: the mean loss of the last fifty steps.
    """
    torch.manual_seed(seed)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(source).float(), AutoTokenizer.from_pretrained(source)
    rng, end, losses = np.random.default_rng(seed), tokenizer.eos_token_id, []
    rows = [scene for _, scene, _ in split_scenes("train", scenes)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_fall(step, steps))
    for _ in range(steps):
        sequences = []
        for scene in (rows[i] for i in rng.integers(0, len(rows), bs)):
            listed = "".join(f" {g.size} {g.colour} {g.kind}" for g in scene.groups) + f" {scene.background}"
            caption = tokenizer.encode(caption_crowded(scene, rng))
            sequences.append(make_sequence(tokenizer.encode(listed), [caption], end, rng))
        ids, labels = pad_rows([tokens for tokens, _ in sequences], end), pad_rows([own for _, own in sequences], -100)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return float(np.mean(losses[-50:]))
