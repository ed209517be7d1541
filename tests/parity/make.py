"""Compute the reference results in this folder with the predecessor's own code, on small weights made here.

    git clone https://github.com/rmokady/CLIP_prefix_caption predecessor
    python -m venv reference
    reference/bin/pip install transformers==4.46.3 torch clip-anytorch scikit-image "setuptools<81"
    reference/bin/python -m tests.parity.make predecessor

Run it from the repository's root. transformers 4.46 is the last whose `AdamW` the predecessor imports. Its files run
unchanged, on the CPU: what asks for a GPU, a published CLIP or old cog is given what it asks for.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import clip
import numpy as np
import torch
from clip.model import CLIP
from transformers import GPT2Config, GPT2LMHeadModel

from demo.world.clip_parts import save_packed
from demo.world.splits import scene_captions, split_scenes
from demo.world.train_gpt2 import END, train_bpe

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "demo" / "images"
COMMIT = "1ad805a844a62ab2e5480479aa021bccf0d4d12a"
SEED = 0
CAPTIONS = 3  # of each image
STORE = "data/coco/oscar_split_ViT-B_32_train.pkl"
TRAINING = {"normalize_prefix": False, "warmup_steps": 10, "epochs": 60, "bs": 6}
FULL_BATCH = {"bs": 30, "epochs": 25, "warmup_steps": 5}
VARIANTS = {
    "mlp_10_10": {
        "mapping_type": "mlp", "prefix_length": 10, "prefix_length_clip": 10, "only_prefix": False, "num_layers": 8,
        "lr": 8e-3,
    },
    "transformer_10_6": {
        "mapping_type": "transformer", "prefix_length": 10, "prefix_length_clip": 6, "only_prefix": True,
        "num_layers": 2, "lr": 6e-3,
    },
}  # fmt: skip


# ---------------------------------------------------------------- the small weights and the data
def write_clip(path):
    """Write a CLIP with a ViT of one layer; its text tower, which nothing asks, is zeros."""
    torch.manual_seed(SEED)
    state = CLIP(
        embed_dim=32, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=8, context_length=77,
        vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1,
    ).half().state_dict()  # fmt: skip
    save_packed({k: v if k.startswith("visual.") else torch.zeros_like(v) for k, v in state.items()}, path)


def write_language_model(folder, captions):
    """Write a GPT-2 of two layers, 16 wide, without dropout, with a byte-level BPE of the captions."""
    folder.mkdir()
    core = train_bpe(captions, 420, [END])
    core.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=core.get_vocab_size(), n_positions=96, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def lay_out(folder):
    """Lay the images and their captions where the predecessor looks for COCO's; returns the captions."""
    samples = sorted(IMAGES.glob("*.jpg"))
    scenes = {image_id: (scene, seed) for image_id, scene, seed in split_scenes("test", 100)}
    (folder / "data/coco/val2014").mkdir(parents=True)
    (folder / "data/coco/annotations").mkdir()
    for sample in samples:
        shutil.copy(sample, folder / f"data/coco/val2014/COCO_val2014_{int(sample.stem):012d}.jpg")
    records = [
        {"image_id": int(sample.stem), "caption": caption}
        for sample in samples
        for caption in scene_captions(*scenes[int(sample.stem)])[:CAPTIONS]
    ]
    (folder / "data/coco/annotations/train_caption.json").write_text(json.dumps(records))
    return [record["caption"] for record in records]


# ---------------------------------------------------------------- the predecessor
class OnCpu:
    """torch, whose every device is the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, _name):
        return torch.device("cpu")


def load_script(clone, name):
    """Return one of the predecessor's scripts as a module."""
    spec = importlib.util.spec_from_file_location(f"predecessor_{name}", clone / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = OnCpu()
    return module


def stub_cog():
    """Put what predict.py decorates with, in a cog of 2021, in the place of cog."""
    cog = types.ModuleType("cog")
    cog.Predictor, cog.Path = object, Path
    cog.input = lambda *_args, **_options: lambda function: function
    sys.modules["cog"] = cog


def train(script, variant, settings, model, folder):
    """Train by the predecessor's loop; returns (rows of each batch, loss of each step)."""
    rows, losses = [], []

    class Recorded(script.ClipCocoDataset):
        def __getitem__(self, item):
            rows.append(item)
            return super().__getitem__(item)

    def cross_entropy(*args, **options):
        loss = compute(*args, **options)
        losses.append(loss.item())
        return loss

    dataset = Recorded(STORE, settings["prefix_length"])
    compute, script.nnf.cross_entropy = script.nnf.cross_entropy, cross_entropy
    try:
        torch.manual_seed(SEED)
        script.train(
            dataset, model, argparse.Namespace(bs=settings["bs"], epochs=settings["epochs"], save_every=1000),
            settings["lr"], settings["warmup_steps"], folder, variant,
        )  # fmt: skip
    finally:
        script.nnf.cross_entropy = compute
    return np.array(rows).reshape(len(losses), -1).tolist(), losses


def build(script, settings):
    """Return the predecessor's model for a variant, with the GPT-2 of the folder `gpt2`."""
    kind = script.ClipCaptionPrefix if settings["only_prefix"] else script.ClipCaptionModel
    torch.manual_seed(SEED)
    return kind(
        settings["prefix_length"], settings["prefix_length_clip"], 32, settings["num_layers"],
        script.MappingType(settings["mapping_type"]),
    )  # fmt: skip


@torch.no_grad()
def forward(script, settings, model, path):
    """Write inputs of four captions, the prefix, and logits of the last 8 positions, first 256 tokens."""
    dataset = script.ClipCocoDataset(STORE, settings["prefix_length"])
    tokens, mask, embedding = (torch.stack(parts) for parts in zip(*(dataset[i] for i in range(4)), strict=True))
    logits = model.eval()(tokens, embedding, mask).logits
    arrays = {
        "tokens": tokens,
        "mask": mask,
        "clip_embedding": embedding,
        "prefix_embeds": model.clip_project(embedding),
    }
    np.savez_compressed(path, logits_last8=logits[:, -8:, :256].numpy(), **{k: v.numpy() for k, v in arrays.items()})


@torch.no_grad()
def caption(script, settings, model):
    """Return {image name: {"greedy", "beam"}}, by predict.py's searches."""
    dataset, found = sys.modules["predecessor_train"].ClipCocoDataset(STORE, settings["prefix_length"]), {}
    for image_id, row in zip(dataset.image_ids, dataset.caption2embedding, strict=True):
        embed = model.eval().clip_project(dataset.prefixes[row][None].float()).reshape(1, settings["prefix_length"], -1)
        found.setdefault(f"COCO_val2014_{image_id:012d}.jpg", {
            "greedy": script.generate2(model, dataset.tokenizer, embed=embed),
            "beam": script.generate_beam(model, dataset.tokenizer, embed=embed),
        })  # fmt: skip
    return found


def compute(clone, folder):
    """Compute everything in the working folder; returns what expected.json holds."""
    parse, script, predict = (load_script(clone, name) for name in ("parse_coco", "train", "predict"))
    sys.modules["predecessor_train"] = script
    captions = lay_out(folder)
    write_clip(folder / "clip-tiny.pt")
    write_language_model(folder / "gpt2", captions)
    shutil.copytree(folder / "gpt2", folder / "gpt2-tiny")
    load_clip = clip.load
    parse.clip = types.SimpleNamespace(
        load=lambda _name, device, jit: load_clip("clip-tiny.pt", device=device, jit=jit)
    )
    parse.main("ViT-B/32")
    variants = {}
    for name, settings in VARIANTS.items():
        settings, file = settings | TRAINING, f"checkpoints/{name}"
        settings |= {"init": f"{file}-init.pt", "final": f"{file}-{settings['epochs'] - 1:03d}.pt"}
        model = build(script, settings)
        os.makedirs("checkpoints", exist_ok=True)
        torch.save(model.state_dict(), settings["init"])
        full = settings | FULL_BATCH
        _, full_losses = train(script, "full", full, build(script, full), "full_batch")
        batches, losses = train(script, name, settings, model, "checkpoints")
        forward(script, settings, model, f"{file}-forward.npz")
        variants[name] = settings | {
            "batches": batches, "losses": losses, "full_batch": FULL_BATCH | {"losses": full_losses},
            "captions": caption(predict, settings, model),
        }  # fmt: skip
        model.gpt.save_pretrained("gpt2")  # the next variant goes on from it
    return {"clip_model_type": "ViT-B/32", "predecessor": COMMIT, "seed": SEED, "variants": variants}


def main():
    """Compute the results and put them into this folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"the predecessor's repository, at {COMMIT[:7]}")
    clone = parser.parse_args().clone.resolve()
    torch.set_num_threads(1)
    stub_cog()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        expected = compute(clone, Path(folder))
        Path("expected.json").write_text(json.dumps(expected))
        kept = [path for path in Path("checkpoints").iterdir() if not path.stem.endswith("-000")]
        for name in ("expected.json", "clip-tiny.pt", STORE, *map(str, kept)):
            (HERE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, HERE / name)
        shutil.copytree("gpt2-tiny", HERE / "gpt2-tiny", dirs_exist_ok=True)
    for name, variant in expected["variants"].items():
        print(name, variant["losses"][0], variant["losses"][-1], [c["greedy"] for c in variant["captions"].values()])


if __name__ == "__main__":
    main()
