"""Measure text-only training on the synthetic world: captions without their pictures, and beside them a few pictures.

    python -m demo.text_only --out demo/out/text_only --seeds 0 1 2

Input: demo/weights. Trains a captioner on the train split's captions alone, with 200 uncaptioned pictures of the val
split; the same on sentences that include the unseen combinations; the first one further on 1 % of the train split's
pairs; and, for comparison, one on all pairs. Each captions the test split. Prints one table of the scenes that are all
right, over the seeds, and writes results.json. A stage that was finished with the same command is skipped on a rerun.
An epoch of a captioner takes about four minutes on one core.
"""

import numpy as np

from demo.experiment import get_parser, mean_and_spread, table
from demo.report import PARTS, judge_variant, read_captions
from demo.run import CLIP, LANGUAGE_MODEL, TRAINING, VARIANTS, draw_world, stages_in
from demo.world.captions import write_captions
from demo.world.scenes import sample_scene
from demo.world.splits import CAPTIONS_PER_IMAGE, SHARE_UNSEEN, write_split
from utils.files import read_json, write_json, write_text

UNLABELLED = 200  # pictures for --match
SHARE_PAIRED = 0.01  # of the train split, to train further on
PAIRS, TEXTS, SENTENCES, TOUCHED = (
    "all pairs",
    "texts",
    "texts, unseen combinations too",
    "texts, then 1 % of the pairs",
)
SENTENCE_SEED = 17
# few and small steps: after one epoch of texts, 180 steps at 2e-4 lost more than 90 scenes taught
TOUCH = ("--bs", 50, "--epochs", 5, "--lr", "5e-5", "--warmup_steps", 5, "--normalize_prefix")


def write_sentences(path, scenes):
    """Write sentences of drawn scenes, one per line, a quarter of them of unseen combinations.

    Args:
        path: text file.
        scenes: how many; each has CAPTIONS_PER_IMAGE sentences.
    """
    lines, every = [], round(1 / SHARE_UNSEEN)
    for number in range(scenes):
        rng = np.random.default_rng((SENTENCE_SEED, number))
        lines += write_captions(sample_scene(rng, number % every == 0), rng, CAPTIONS_PER_IMAGE)
    write_text(path, "\n".join(lines) + "\n")


def write_pairs(captions, path, images):
    """Write the annotations of a split's first images."""
    value = read_json(captions)
    kept = {image["id"] for image in value["images"][:images]}
    own = [record for record in value["annotations"] if record["image_id"] in kept]
    write_json(path, {"images": value["images"][:images], "annotations": own})


def make_stores(stages, scenes, test):
    """Draw the world and make the stores; returns (folder of the world, {name: store})."""
    out = stages.out
    world = draw_world(stages, scenes, test)
    few, sentences, pairs = world / "val", world / "sentences.txt", world / "captions_pairs.json"
    captions, paired = world / "captions_train.json", round(SHARE_PAIRED * scenes)
    stages.run("draw val", f"{UNLABELLED} scenes", [few], lambda: write_split("val", UNLABELLED, world))
    stages.run("write sentences", f"{scenes} scenes", [sentences], lambda: write_sentences(sentences, scenes))
    stages.run("pick pairs", f"{paired} scenes", [pairs], lambda: write_pairs(captions, pairs, paired))
    train = ("--images", world / "train")
    parsed = {
        "pairs": ("--annotations", captions, *train),
        "one_percent": ("--annotations", pairs, *train),
        "few": ("--no_captions", "--images", few),
        "texts": ("--text_only", "--annotations", captions),
        "sentences": ("--text_only", "--annotations", sentences),
    }
    for name, flags in parsed.items():
        store = out / f"{name}.pkl"
        stages.script(f"parse {name}", ["parse_coco.py", "--clip_model_type", CLIP, *flags, "--out", store], [store])
    return world, {name: out / f"{name}.pkl" for name in parsed}


def caption(stages, name, world, flags):
    """Train a captioner and caption the test split; returns (checkpoint, {image_id: caption})."""
    checkpoint, captions = stages.out / name / "run_latest.pt", stages.out / f"captions_{name}.json"
    stages.script(f"train {name}", [
        "train.py", "--out_dir", stages.out / name, "--prefix", "run", "--language_model", LANGUAGE_MODEL,
        "--save_every", 100, *flags,
    ], [checkpoint])  # fmt: skip
    stages.script(
        f"predict {name}", ["predict.py", world / "test", "--checkpoint", checkpoint, "--out", captions], [captions]
    )
    return checkpoint, read_captions(captions)


def measure(stages, world, stores, seed, epochs, angles):
    """Train and caption by every method with one seed; returns {method: {part of PARTS: share all right}}."""
    scenes = read_json(world / "scenes_test.json")
    match = ("--match", stores["few"])
    usual = (*TRAINING, *VARIANTS[0].flags, "--epochs", epochs, "--seed", seed)
    texts = ("--data", stores["texts"], *match, *usual)
    methods = {
        PAIRS: ("pairs", ("--data", stores["pairs"], *usual)),
        TEXTS: ("texts", (*texts, "--noise_angle", "auto")),
        SENTENCES: ("sentences", ("--data", stores["sentences"], *match, *usual, "--noise_angle", "auto")),
    } | {f"texts, {angle:g} degrees": (f"angle_{angle:g}", (*texts, "--noise_angle", angle)) for angle in angles}
    said = {}
    for method, (name, flags) in methods.items():
        checkpoint, said[method] = caption(stages, f"{name}_{seed}", world, flags)
        if method == TEXTS:
            touch = ("--data", stores["one_percent"], "--init_from", checkpoint, *TOUCH, "--seed", seed)
            _, said[TOUCHED] = caption(stages, f"touched_{seed}", world, touch)
    judged = {method: judge_variant(captions, scenes)[1] for method, captions in said.items()}
    return {method: {part: figures[part]["all"]["share"] for part in PARTS} for method, figures in judged.items()}


def rows_of(results):
    """Return the rows of the table: scenes all right, over the seeds; `results`: {seed: what `measure` returns}."""
    return {
        method: [f"{mean_and_spread([100 * shares[method][part] for shares in results.values()])} %" for part in PARTS]
        for method in next(iter(results.values()))
    }


def main(argv=None):
    """Measure what the command line asks for."""
    parser = get_parser("Measure text-only training on the synthetic world.", "text_only")
    parser.add_argument("--epochs", type=int, default=VARIANTS[0].epochs, help="passes over the captions")
    parser.add_argument("--angles", type=float, nargs="*", default=[], help="noise angles to compare `auto` with")
    args = parser.parse_args(argv)
    with stages_in(args.out) as stages:
        world, stores = make_stores(stages, args.scenes, args.test)
        results = {}
        for seed in args.seeds:
            results[seed] = measure(stages, world, stores, seed, args.epochs, args.angles)
            write_json(stages.out / "results.json", results)
    print("\n".join(table(PARTS, rows_of(results))))


if __name__ == "__main__":
    main()
