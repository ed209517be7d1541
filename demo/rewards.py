"""Measure training on rewards in the made world: CIDEr-D, and CLIP on pictures that nobody captioned.

    python -m demo.rewards --out demo/out/rewards --seeds 0 1 2

Input: demo/weights, whose captioner every run begins with. Trains it by train_scst.py on the train split's references;
on those of them that begin with a thing, half of the phrasings, so that a captioner that only learned to please its
references would show; and by CLIP alone on pictures without captions, half of them of unseen combinations. Each
captions the test split, whose references have all phrasings. Prints a table over the seeds and writes results.json. A
stage that was finished with the same command is skipped on a rerun. A seed takes about 20 minutes on one core.
"""

import argparse
import os
import statistics
from pathlib import Path

from demo.captions import parse_caption
from demo.report import PARTS, judge_variant, read_captions, read_references
from demo.run import CLIP, ROOT, Stages, draw_world
from demo.world import write_split
from metrics.coco import coco_scores
from models.pretrained import DEMO_CHECKPOINT
from utils.files import read_json, write_json

UNCAPTIONED = 1500  # pictures to adapt to
BEGINNINGS = ("There", "On", "In")  # of the phrasings that are kept out
SEARCHES = {"greedy": (), "beam 5": ("--use_beam_search",)}
SCST = ("--bs", 20, "--lr", "1e-4")
REWARDS = {  # method -> store, flags; 450 and 600 steps of 20 images
    "cider": ("pairs", ("--epochs", 1)),
    "cider, half the phrasings": ("half", ("--epochs", 1)),
    "clip, no captions": ("adapt", ("--reward", "clip", "--kl", 0.05, "--samples", 8, "--epochs", 8)),
}
START = "the captioner at the start"


def write_half(captions, path):
    """Write the annotations of a split that begin with a thing."""
    value = read_json(captions)
    own = [record for record in value["annotations"] if record["caption"].split()[0] not in BEGINNINGS]
    write_json(path, {"images": value["images"], "annotations": own})


def make_stores(stages, scenes, test):
    """Draw the world and make the stores; returns (folder of the world, {name: store})."""
    world = draw_world(stages, scenes, test)
    adapt, half, captions = world / "adapt", world / "captions_half.json", world / "captions_train.json"
    stages.run("draw adapt", f"{UNCAPTIONED} scenes", [adapt], lambda: write_split("adapt", UNCAPTIONED, world))
    stages.run("pick phrasings", "half", [half], lambda: write_half(captions, half))
    parsed = {
        "pairs": ("--annotations", captions, "--images", world / "train"),
        "half": ("--annotations", half, "--images", world / "train"),
        "adapt": ("--no_captions", "--images", adapt),
    }
    for name, flags in parsed.items():
        store = stages.out / f"{name}.pkl"
        stages.script(f"parse {name}", ["parse_coco.py", "--clip_model_type", CLIP, *flags, "--out", store], [store])
    return world, {name: stages.out / f"{name}.pkl" for name in parsed}


def measure(stages, world, name, checkpoint):
    """Caption the test split by every search; returns {search: figures}."""
    scenes, figures = read_json(world / "scenes_test.json"), {}
    references = read_references(world / "scenes_test.json", scenes)
    for search, flags in SEARCHES.items():
        out = stages.out / f"captions_{name}_{search.split()[0]}.json"
        words = ["predict.py", world / "test", "--checkpoint", checkpoint, "--out", out, *flags]
        stages.script(f"predict {name}, {search}", words, [out])
        captions = read_captions(out)
        shares = judge_variant(captions, scenes)[1]
        figures[search] = {part: 100 * shares[part]["all"]["share"] for part in PARTS}
        figures[search]["CIDEr"] = coco_scores(captions, references, ("CIDEr",), "python").metrics["CIDEr"]
        figures[search]["grammatical"] = 100 * statistics.mean(map(bool, map(parse_caption, captions.values())))
    return figures


def train(stages, name, store, flags, seed):
    """Train from the demo's captioner; returns the checkpoint."""
    folder = stages.out / f"{name}_{seed}"
    checkpoint = folder / "scst_prefix_latest.pt"
    stages.script(f"train {name} {seed}", [
        "train_scst.py", "--init_from", DEMO_CHECKPOINT.relative_to(ROOT), "--data", store, "--out_dir", folder,
        "--seed", seed, *SCST, *flags,
    ], [checkpoint])  # fmt: skip
    return checkpoint


def table(results):
    """Return the lines of the table, mean and deviation over the runs of {method: [what `measure` returns]}."""
    columns = (*PARTS, "CIDEr", "grammatical")
    lines = [f"{'':40}" + "".join(f"{column:>22}" for column in columns)]
    for method, runs in results.items():
        for search in SEARCHES:
            cells = []
            for column in columns:
                values = [run[search][column] for run in runs]
                digits, unit = (3, "") if column == "CIDEr" else (1, " %")
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}{unit}")
            lines.append(f"{f'{method}, {search}':40}" + "".join(f"{cell:>22}" for cell in cells))
    return lines


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Measure training on rewards in the made world.")
    parser.add_argument("--out", type=Path, default=Path("demo/out/rewards"), help="folder to write")
    parser.add_argument("--scenes", type=int, default=9000, help="training scenes")
    parser.add_argument("--test", type=int, default=1000, help="test scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each reward per seed")
    parser.add_argument("--methods", nargs="+", choices=REWARDS, default=list(REWARDS), help="rewards to measure")
    return parser


def main(argv=None):
    """Measure what the command line asks for."""
    args = get_parser().parse_args(argv)
    out = Path(os.path.relpath(args.out.resolve(), ROOT))  # commands and files name no absolute path
    os.chdir(ROOT)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    world, stores = make_stores(stages, args.scenes, args.test)
    results = {START: [measure(stages, world, "start", "demo")]}
    for seed in args.seeds:
        for method in args.methods:
            store, flags = REWARDS[method]
            name = method.replace(", ", "_").replace(" ", "_")
            checkpoint = train(stages, name, stores[store], flags, seed)
            results.setdefault(method, []).append(measure(stages, world, f"{name}_{seed}", checkpoint))
            write_json(out / "results.json", results)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
