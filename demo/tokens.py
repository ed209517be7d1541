"""Measure pooled vectors against patch tokens, by every mapping network, on crowded and ordinary scenes.

    python -m demo.tokens --out demo/out/tokens --seeds 0 1 2

Input: demo/weights, whose GPT-2 it begins with. Draws scenes of one to six objects, trains a small ViT CLIP on them
whose patches stay readable (demo/world/crowded_clip.py), and a captioner per mapping network, with the language model
frozen, tuned or with a LoRA, all for equal steps on the same scenes. Each captions two test splits. Prints, for each,
the share of objects named right and of scenes all right, over the seeds, and writes results.json. A stage that was
finished with the same command is skipped on a rerun.
"""

import sys

import numpy as np

from demo.experiment import get_parser, mean_and_spread, table
from demo.report import read_captions
from demo.run import LANGUAGE_MODEL, stages_in
from demo.world.crowded import judge_crowded, split_scenes, write_crowded
from demo.world.crowded_clip import train_clip, train_language_model
from utils.files import write_json

SPLITS = ("ordinary", "crowded")
TOKENS = ("pooled", "patches")
NETWORKS = {  # input, mapping network -> store, flags
    "pooled, mlp": ("pooled", ("--mapping_type", "mlp", "--prefix_length", 10)),
    "pooled, transformer": (
        "pooled",
        ("--mapping_type", "transformer", "--prefix_length", 10, "--prefix_length_clip", 10, "--num_layers", 2),
    ),
    "patches, mlp": ("patches", ("--mapping_type", "mlp")),
    "patches, transformer": ("patches", ("--mapping_type", "transformer", "--prefix_length", 10, "--num_layers", 2)),
    "patches, resampler": ("patches", ("--mapping_type", "resampler", "--prefix_length", 10, "--num_layers", 2)),
}  # fmt: skip
LEARNS = {"frozen": ("--only_prefix",), "LoRA": ("--lora_rank", 8), "tuned": ()}  # of the language model
ENCODER_CODE = tuple(  # with other code, every stage runs again
    f"demo/world/{name}.py" for name in ("crowded", "crowded_clip", "clip_parts", "draw", "scenes", "train_gpt2")
)
TRAINING = ("--bs", 50, "--warmup_steps", 50, "--lr", "1e-3", "--save_every", 100)


def make_stores(stages, scenes, test, clip_epochs, steps, readable):
    """Draw the world, train encoder and language model; returns (world, GPT-2's folder, {tokens: store})."""
    out, world = stages.out, stages.out / "world"
    clip, language_model = out / "clip.pt", out / "gpt2"
    for split, number in (("train", scenes), *((split, test) for split in SPLITS)):
        stages.run(f"draw {split}", f"{number} scenes", [world / f"captions_{split}.json"],
                   lambda s=split, n=number: write_crowded(s, n, world))  # fmt: skip

    def clip_stage():
        share = train_clip(scenes, world / "train", clip_epochs, clip)
        print(f"held-out patches that tell the object they show: {100 * share:.1f} %", flush=True)
        if share < readable:
            clip.unlink()
            sys.exit(
                f"error: the encoder's patches tell {100 * share:.0f} % of the objects; more --clip_epochs or --scenes"
            )

    def language_stage():
        print(f"loss {train_language_model(scenes, steps, LANGUAGE_MODEL, language_model):.3f}", flush=True)

    stages.run("train clip", f"{scenes} scenes, {clip_epochs} epochs", [clip], clip_stage)
    stages.run("train gpt2", f"{scenes} scenes, {steps} steps", [language_model / "config.json"], language_stage)
    for tokens in TOKENS:
        store = out / f"{tokens}.pkl"
        stages.script(f"parse {tokens}", [
            "parse_coco.py", "--clip_model_type", clip, "--tokens", tokens, "--annotations",
            world / "captions_train.json", "--images", world / "train", "--out", store,
        ], [store])  # fmt: skip
    return world, language_model, {tokens: out / f"{tokens}.pkl" for tokens in TOKENS}


def measure(stages, world, split, test, name, checkpoint):
    """Caption a split; returns (share of objects named right, share of scenes all right)."""
    out = stages.out / f"captions_{name}_{split}.json"
    words = ["predict.py", world / split, "--checkpoint", checkpoint, "--out", out, "--quiet"]
    stages.script(f"predict {name} {split}", words, [out])
    captions = read_captions(out)
    judged = [judge_crowded(captions[image_id], scene) for image_id, scene, _ in split_scenes(split, test)]
    return [float(share) for share in np.mean(judged, axis=0)]


def train(stages, name, data, language_model, flags):
    """Train a captioner; returns its checkpoint."""
    checkpoint = stages.out / name / "run_latest.pt"
    stages.script(f"train {name}", [
        "train.py", "--data", data, "--language_model", language_model, "--out_dir", stages.out / name, "--prefix",
        "run", *TRAINING, *flags,
    ], [checkpoint])  # fmt: skip
    return checkpoint


def rows_of(results):
    """Return the rows of the table; results: {method: {seed: {split: (objects, scenes)}}}."""
    rows = {}
    for method, seeds in results.items():
        shares = [[100 * run[split][i] for run in seeds.values()] for split in SPLITS for i in (0, 1)]
        rows[method] = [f"{mean_and_spread(values)} %" for values in shares]
    return rows


def main(argv=None):
    """Measure what the command line asks for."""
    parser = get_parser("Measure pooled vectors against patch tokens.", "tokens")
    parser.set_defaults(scenes=12000, test=500)
    parser.add_argument("--clip_epochs", type=int, default=10, help="of the encoder's training")
    parser.add_argument("--readable", type=float, default=0.6, help="share of patches that must tell their object")
    parser.add_argument("--steps", type=int, default=600, help="of the language model's training")
    parser.add_argument("--epochs", type=int, default=4, help="of each captioner")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="to measure")
    parser.add_argument("--learns", nargs="+", choices=LEARNS, default=list(LEARNS), help="the language model")
    args = parser.parse_args(argv)
    with stages_in(args.out, ENCODER_CODE) as stages:
        world, language_model, stores = make_stores(
            stages, args.scenes, args.test, args.clip_epochs, args.steps, args.readable
        )
        results = {}
        for seed in args.seeds:
            for network, (tokens, flags) in ((name, NETWORKS[name]) for name in args.networks):
                for learns in args.learns:
                    name = f"{network}_{learns}_{seed}".replace(", ", "_")
                    own = (*flags, *LEARNS[learns], "--epochs", args.epochs, "--seed", seed)
                    checkpoint = train(stages, name, stores[tokens], language_model, own)
                    shares = {split: measure(stages, world, split, args.test, name, checkpoint) for split in SPLITS}
                    results.setdefault(f"{network}, {learns}", {})[seed] = shares
                    write_json(stages.out / "results.json", results)
    columns = [f"{split}: {what}" for split in SPLITS for what in ("objects", "scenes all right")]
    print("\n".join(table(columns, rows_of(results))))


if __name__ == "__main__":
    main()
