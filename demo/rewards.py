"""Measure training on rewards in the synthetic world: CIDEr-D, and CLIP on pictures that nobody captioned.

    python -m demo.rewards --out demo/out/rewards --seeds 0 1 2

Input: demo/weights, whose captioner every run begins with. Trains it by train_scst.py on the train split's references;
on about half of these, the ones that do not begin with the place, which reveals a captioner that only learned its
references' phrasing; and by CLIP alone on pictures without captions, half of them of unseen combinations. Each captions
the test split, whose references have all phrasings. Prints a table over the seeds and writes results.json. A stage that
was finished with the same command is skipped on a rerun.
"""

import statistics

from demo.experiment import get_parser, mean_and_spread, table
from demo.report import PARTS, judge_variant, read_captions, read_references
from demo.run import CLIP, ROOT, draw_world, stages_in
from demo.world.captions import parse_caption
from demo.world.splits import write_split
from metrics.coco import coco_scores
from models.pretrained import DEMO_CHECKPOINT
from utils.files import read_json, write_json

UNCAPTIONED = 1500  # pictures to adapt to
BEGINNINGS = ("On", "In")  # of the phrasings that are kept out: those that begin with the place, four of nine
SEARCHES = {"greedy": (), "beam 5": ("--use_beam_search",)}
SCST = ("--bs", 20, "--lr", "1e-4")
ADAPTED = "clip, no captions"
REWARDS = {  # method -> store, flags; 450, 600 and 900 steps of 20 images
    "cider": ("pairs", ("--epochs", 1)),
    "cider+clip": ("pairs", ("--epochs", 1, "--reward", "cider+clip")),
    "cider, half the phrasings": ("half", ("--epochs", 1)),
    ADAPTED: ("adapt", ("--reward", "clip", "--kl", 0.05, "--samples", 8, "--epochs", 8)),
    f"{ADAPTED}, then cider+clip": ("pairs", ("--epochs", 2, "--reward", "cider+clip", "--kl", 0.02)),
}
FROM = {f"{ADAPTED}, then cider+clip": ADAPTED}  # method -> method whose captioner of the same seed it begins with
START = "the captioner at the start"
COLUMNS = (*PARTS, "grammatical", "CIDEr")


def write_half(captions, path):
    """Write the annotations of a split that do not begin with the place."""
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


def train(stages, stores, method, seed):
    """Train by a method, after the one that it begins with; returns (name of the run, checkpoint)."""
    (store, flags), name = REWARDS[method], method.replace(", ", "_").replace(" ", "_")
    start = DEMO_CHECKPOINT.relative_to(ROOT)
    if method in FROM:
        _, start = train(stages, stores, FROM[method], seed)
    folder = stages.out / f"{name}_{seed}"
    checkpoint = folder / "scst_prefix_latest.pt"
    stages.script(f"train {name} {seed}", [
        "train_scst.py", "--init_from", start, "--data", stores[store], "--out_dir", folder, "--seed", seed, *SCST,
        *flags,
    ], [checkpoint])  # fmt: skip
    return folder.name, checkpoint


def rows_of(results):
    """Return the rows of the table; `results`: {method: [what `measure` returns, one per seed]}."""
    rows = {}
    for method, runs in results.items():
        for search in SEARCHES:
            shares = [mean_and_spread([run[search][name] for run in runs]) for name in COLUMNS[:-1]]
            rows[f"{method}, {search}"] = [*(f"{share} %" for share in shares),
                                           mean_and_spread([run[search]["CIDEr"] for run in runs], 3)]  # fmt: skip
    return rows


def main(argv=None):
    """Measure what the command line asks for."""
    parser = get_parser("Measure training on rewards in the synthetic world.", "rewards")
    parser.add_argument("--methods", nargs="+", choices=REWARDS, default=list(REWARDS), help="rewards to measure")
    args = parser.parse_args(argv)
    with stages_in(args.out, (DEMO_CHECKPOINT,)) as stages:
        world, stores = make_stores(stages, args.scenes, args.test)
        results = {START: [measure(stages, world, "start", "demo")]}
        for seed in args.seeds:
            for method in args.methods:
                name, checkpoint = train(stages, stores, method, seed)
                results.setdefault(method, []).append(measure(stages, world, name, checkpoint))
                write_json(stages.out / "results.json", results)
    print("\n".join(table(COLUMNS, rows_of(results))))


if __name__ == "__main__":
    main()
