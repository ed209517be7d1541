"""Train the synthetic world's CLIP, in OpenAI's architecture, on pictures that clip_cache drew.

    python -m demo.world.train_clip --minutes 50

Loss: CLIP's contrastive loss, where batches are families of scenes that differ in one
respect (hard negatives on both sides) and each picture meets one more wrong caption, mostly
with its relation turned; plus the loss of linear heads that read the scene off the pooled image
embedding. Contrast alone teaches a pooled embedding little about which attribute belongs to
which object; the heads do. They are thrown away after training. What is exported is a
running average of the weights.

A rerun goes on from `--state`; `--init_from` begins with the weights of a CLIP that this command
wrote. Writes a plain fp16 state dict that `clip.load(path, device="cpu")` reads; unused rows of
its token embedding are zero.

The weights in demo/weights were made in stages rather than with one setting: 47.5 minutes (0.79 M
of 128,000 pictures) with a small caption decoder in place of the heads, whose relations a mapping
network could not learn to read (52 % right after training a captioner on 9,000 scenes, though the
decoder itself read 95 %); then 14 minutes with the heads, `--init_from demo/weights/clip.pt --lr 1e-3`
on 48,000 pictures, until they read 97 % of held-out relations and 90 % of scenes wholly.
"""

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from demo.world.captions import write_caption
from demo.world.clip_cache import FAMILY, read_chunks
from demo.world.clip_parts import (
    EMBED_DIM,
    Heads,
    Words,
    build_clip,
    contrastive_loss,
    export_state_dict,
    image_batch,
    import_state_dict,
    save_packed,
)
from demo.world.scenes import RELATIONS, edit_scene

EMA_DECAY = 0.98  # what is exported is this running average of the weights
HELD_OUT = 100  # families of the last chunk, to measure on


# ---------------------------------------------------------------- data
class Families:
    """Batches of whole families, in an order that depends on the epoch only."""

    def __init__(self, chunks):
        per_chunk = [len(scenes) // FAMILY for _, scenes in chunks]
        places = [(c, f) for c, n in enumerate(per_chunk) for f in range(n)]
        self.chunks, self.train, self.held_out = chunks, places[:-HELD_OUT], places[-HELD_OUT:]

    def batch(self, places):
        """Return (uint8 [4 F, R, R, 3], list of 4 F scenes) of F families."""
        pictures = [self.chunks[c][0][f * FAMILY : (f + 1) * FAMILY] for c, f in places]
        scenes = [s for c, f in places for s in self.chunks[c][1][f * FAMILY : (f + 1) * FAMILY]]
        return np.concatenate(pictures), scenes

    def order(self, epoch):
        """Return the training families' order in an epoch."""
        return np.random.default_rng((31, epoch)).permutation(len(self.train))


def misread(scene, rng):
    """Return the scene that a hard-negative caption describes: the relation turned, or one edit."""
    if scene.relation is None or rng.random() < 0.25:
        return edit_scene(scene, rng)
    groups = scene.groups[::-1] if rng.random() < 0.7 else scene.groups
    relation = scene.relation
    if groups == scene.groups or rng.random() < 0.3:
        relation = next(r for r in RELATIONS if r != scene.relation)
    return replace(scene, groups=groups, relation=relation)


# ---------------------------------------------------------------- measuring
@torch.no_grad()
def measure(model, heads, words, families):
    """Read the held-out pictures with the heads.

    Returns: share right per attribute (of both groups) and "all", and "pick": how often, among the four captions of a
    family, the picture's own has the largest cosine.
    """
    model.eval()
    pictures, scenes = families.batch(families.held_out)
    with torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(image_batch(pictures))
        rng = np.random.default_rng(5)
        text = model.encode_text(words.encode([write_caption(s, rng) for s in scenes]))
    targets = heads.targets(scenes)  # [heads, B]
    right = torch.stack([logits.argmax(-1) for logits in heads(image)]) == targets
    right |= targets < 0
    names = [name for _, name in heads.names] + ["relation", "background"]
    result = {
        name: round(right[[i for i, n in enumerate(names) if n == name]].all(0).float().mean().item(), 4)
        for name in dict.fromkeys(names)
    }
    result["all"] = round(right.all(0).float().mean().item(), 4)
    a = F.normalize(image.float(), dim=-1).view(-1, FAMILY, EMBED_DIM)
    b = F.normalize(text.float(), dim=-1).view(-1, FAMILY, EMBED_DIM)
    best = (a @ b.transpose(1, 2)).argmax(-1)
    result["pick"] = round((best == torch.arange(FAMILY)).float().mean().item(), 4)
    model.train()
    return result


@torch.no_grad()
def export(model, words, families, path):
    """Write the CLIP to `path`."""
    model.eval()
    image = model.encode_image(image_batch(families.batch(families.held_out)[0]))
    rms = image.pow(2).mean().sqrt().item()
    model.train()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_packed(export_state_dict(model, words, rms), path)


# ---------------------------------------------------------------- training
class Trainer:
    """CLIP, heads, optimiser and their state file."""

    def __init__(self, args, families):
        torch.manual_seed(args.seed)
        self.args, self.families, self.words = args, families, Words()
        self.model = build_clip(self.words, args.context, args.vision, args.layers, args.width)
        self.model = self.model.float()
        if args.init_from:
            state = torch.load(args.init_from, weights_only=True)
            self.model.load_state_dict(import_state_dict(state, self.words, args.context))
        self.heads = Heads()
        self.parameters = list(self.model.parameters()) + list(self.heads.parameters())
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
        self.step, self.minutes = 0, 0.0
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
        if os.path.exists(args.state):
            self._load()

    def _load(self):
        state = torch.load(self.args.state, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step, self.minutes = state["step"], state["minutes"]

    def save(self):
        """Write the state file and the CLIP."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"average": self.average.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "minutes": self.minutes}
        Path(self.args.state).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, f"{self.args.state}.part")
        os.replace(f"{self.args.state}.part", self.args.state)
        export(self.average.module, self.words, self.families, self.args.out)

    def rate(self):
        """Return the learning rate: warm-up, flat to 35 % of the time, cosine to zero."""
        done = min(1.0, self.minutes / self.args.minutes)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.35) / 0.65))
        return self.args.lr * min(1.0, (self.step + 1) / 200) * fall

    def train_step(self, places):
        """Take one step on some families; returns (contrastive, heads') losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        pictures, scenes = self.families.batch(places)
        rng = np.random.default_rng((self.args.seed, self.step))
        tokens = self.words.encode([write_caption(s, rng) for s in scenes])  # [B, T]
        wrong = self.words.encode([write_caption(misread(s, rng), rng) for s in scenes])
        both = torch.cat([F.pad(t, (0, self.args.context - t.shape[1])) for t in (tokens, wrong)])
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(image_batch(pictures))
            text, negative = self.model.encode_text(both).chunk(2)
        contrast = contrastive_loss(image, text, negative, self.model.logit_scale.exp(), scenes)
        reading = self.heads.loss(image, scenes)
        (contrast + self.args.heads_weight * reading).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)
        self.model.logit_scale.data.clamp_(0, math.log(100))
        return contrast.item(), reading.item()

    def run(self):
        """Train until the time is spent; saves every `save_minutes`."""
        size = self.args.bs // FAMILY
        steps = len(self.families.train) // size
        saved, sums = self.minutes, []
        while self.minutes < self.args.minutes:
            began = time.monotonic()
            epoch, within = divmod(self.step, steps)
            order = self.families.order(epoch)[within * size : (within + 1) * size]
            sums.append(self.train_step([self.families.train[i] for i in order]))
            self.step += 1
            self.minutes += (time.monotonic() - began) / 60
            if self.step % 50 == 0:
                contrast, reading = np.mean(sums, 0)
                pace = self.step * self.args.bs / self.minutes / 60
                print(
                    f"{self.step} {self.minutes:.1f} min contrast {contrast:.3f} heads {reading:.4f} {pace:.0f}/s",
                    flush=True,
                )
                sums = []
            if self.minutes - saved >= self.args.save_minutes or self.minutes >= self.args.minutes:
                saved = self.minutes
                self.save()
                print(json.dumps(measure(self.average.module, self.heads, self.words, self.families)), flush=True)


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Train the synthetic world's CLIP.")
    parser.add_argument("--cache", default="demo/out/clip_cache", help="folder of clip_cache")
    parser.add_argument("--state", default="demo/out/clip_state.pt", help="file to go on from")
    parser.add_argument("--init_from", metavar="FILE", help="a CLIP that this command wrote, to begin with")
    parser.add_argument("--out", default="demo/weights/clip.pt", help="the CLIP to write")
    parser.add_argument("--minutes", type=float, default=50, help="training time in all, minutes")
    parser.add_argument("--save_minutes", type=float, default=3, help="time between saves, minutes")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--bs", type=int, default=64, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--heads_weight", type=float, default=4.0, help="weight of the heads' loss")
    parser.add_argument("--vision", choices=("resnet", "vit"), default="resnet", help="image tower")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 1, 2, 1], help="blocks per stage, or of the ViT")
    parser.add_argument("--width", type=int, default=16, help="width of the image tower")
    parser.add_argument("--context", type=int, default=26, help="longest caption in training, tokens")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and wording")
    return parser


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    chunks = read_chunks(args.cache)
    if not chunks:
        raise FileNotFoundError(f"--cache {args.cache} holds no pictures; run python -m demo.world.clip_cache first")
    Trainer(args, Families(chunks)).run()


if __name__ == "__main__":
    main()
