"""Train a small ViT CLIP, whose patches stay readable, and a GPT-2 on scenes of one to six objects.

CLIP's contrastive loss teaches a ViT's pooled vector; its patches are only asked to serve that. Two heads are trained
beside it and thrown away: one reads off the pooled vector which objects there are, so that it holds as many as it can,
one off each patch which object covers it. Both encoders of demo.tokens are this one tower.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel

from demo.clip_cache import RESOLUTION
from demo.clip_parts import Words, build_clip, contrastive_loss, export_state_dict, image_batch, save_packed
from demo.crowded import caption_crowded, draw_crowded, layout_of, split_scenes
from demo.draw import SIZE
from demo.train_gpt2 import make_sequence, pad_rows
from demo.world import COLOURS, KINDS, SIZES

WIDTH, LAYERS, PATCH = 128, 4, 12
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
            there: [3, B, K] size, colour, kind of the object at each patch, 0 where there is none.
        """
        scaled = F.normalize(pooled.float(), dim=-1) * math.sqrt(pooled.shape[-1])
        seen = F.binary_cross_entropy_with_logits(self.present(scaled), present, pos_weight=torch.tensor(8.0))
        read = [
            F.cross_entropy(head(patches.float()).flatten(0, 1), place.flatten())
            for head, place in zip(self.patch, there, strict=True)
        ]
        return seen + sum(read) / 3


def targets(rows):
    """Return (present, there) of `split_scenes`' rows, for CrowdedHeads: a patch has what covers its middle."""
    side = RESOLUTION // PATCH
    middles = (np.arange(side) + 0.5) * SIZE / side
    y, x = np.meshgrid(middles, middles, indexing="ij")
    present, there = torch.zeros(len(rows), len(COLOURS) * len(KINDS)), torch.zeros(3, len(rows), side, side)
    for row, (_, scene, seed) in enumerate(rows):
        centres, radii, _ = layout_of(scene, seed)
        for group, centre, radius in zip(scene.groups, centres, radii, strict=True):
            present[row, COLOURS.index(group.colour) * len(KINDS) + KINDS.index(group.kind)] = 1
            covered = torch.from_numpy(np.hypot(x - centre[0], y - centre[1]) <= radius)
            looks = SIZES.index(group.size), COLOURS.index(group.colour), KINDS.index(group.kind)
            for number, look in enumerate(looks):
                there[number, row][covered] = 1 + look
    return present, there.flatten(2).long()


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


def pictures_of(rows):
    """Return the pictures of `split_scenes`' rows as CLIP sees them, uint8 [N, R, R, 3]."""
    side = (RESOLUTION, RESOLUTION)
    return np.stack([np.asarray(draw_crowded(scene, seed).resize(side, 3)) for _, scene, seed in rows])


def train_clip(scenes, epochs, path, bs=64, lr=1e-3, seed=0):
    """Train the CLIP on the first scenes of the train split and write it as `clip.load` reads it.

    Args:
        scenes: how many, a few of which are held out. epochs: passes over them.
        path: file to write. bs: pictures a step. lr: peak learning rate. seed: of weights and order.
    Returns: share of the held-out pictures' patches on objects off which the object's colour and kind are read.
    """
    torch.manual_seed(seed)
    rows = split_scenes("train", scenes)
    pictures, words = pictures_of(rows), Words()
    model = build_clip(words, CONTEXT, "vit", [LAYERS], WIDTH).float()
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
        drawn = [rows[i] for i in batch]
        shown = [scene for _, scene, _ in drawn]
        tokens = words.encode([caption_crowded(scene, rng) for scene in shown])
        tokens = F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
        with torch.autocast("cpu", torch.bfloat16):
            pooled, patches = embed(model, image_batch(pictures[batch]))
            texts = model.encode_text(tokens)
        contrast = contrastive_loss(pooled, texts, texts.roll(1, 0), model.logit_scale.exp(), shown)
        loss = contrast + HEADS_WEIGHT * heads.loss(pooled, patches, *targets(drawn))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 100 == 0:
            print(f"step {step} of {steps}: contrast {contrast.item():.3f}, loss {loss.item():.3f}", flush=True)
    return _save(model.eval(), heads, words, pictures[-held_out:], rows[-held_out:], path)


@torch.no_grad()
def _save(model, heads, words, pictures, rows, path):
    """Write the CLIP; returns what `train_clip` does."""
    parts = [embed(model, image_batch(pictures[start : start + 256])) for start in range(0, len(pictures), 256)]
    pooled, patches = (torch.cat(part) for part in zip(*parts, strict=True))
    _, there = targets(rows)
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
