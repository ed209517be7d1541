"""Run the whole way on the synthetic world: draw, extract, train, caption, report.

    python -m demo.run --out demo/out

Input: demo/weights. Output: `world/`, a feature store, a folder with a checkpoint per captioner, captions jsons,
report.html and report.json in `--out`. One captioner is trained; --short and --full train two. Every stage is the
repository's own command; a stage that was finished with the same command is skipped on a rerun.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from demo.report import summary_lines, write_report
from demo.world.splits import write_split
from models.checkpoint import load_weights
from models.checkpoint import save_weights as write_checkpoint
from utils.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
CLIP = "demo/weights/clip.pt"
LANGUAGE_MODEL = "demo/weights/gpt2"


@dataclass(frozen=True)
class Variant:
    """One captioner to train: its name in files, in the report, and its flags of train.py."""

    name: str
    title: str
    epochs: int
    flags: tuple


VARIANTS = (
    Variant("mlp", "MLP + fine-tuned GPT-2", 6, ("--lr", "1e-3")),
    Variant("transformer", "transformer + frozen GPT-2", 6, (
        "--only_prefix", "--mapping_type", "transformer", "--num_layers", "2", "--lr", "2e-3")),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of the demo is run: training and test scenes, captioners, epochs (None: their own), time it takes."""

    scenes: int
    test: int
    variants: tuple
    epochs: int | None
    takes: str


SIZES = {
    "short": Size(600, 80, VARIANTS, 2, "a minute or two, to see that everything runs"),
    "usual": Size(4000, 500, VARIANTS[:1], 4, "three to four minutes on two cores"),
    "full": Size(9000, 1000, VARIANTS, None, "about half an hour on two cores"),
}
TRAINING = ("--bs", "100", "--warmup_steps", "100", "--prefix_length", "10", "--prefix_length_clip", "10")


def weights_digest(files=()):
    """Return a short digest of the weights, and of further files: with other ones every stage runs again."""
    digest = hashlib.sha256((ROOT / CLIP).read_bytes())
    for file in (Path(LANGUAGE_MODEL) / "model.safetensors", *files):
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()[:12]


class Stages:
    """Runs stages in order, times them, and skips those whose stamp shows the same command."""

    def __init__(self, out, files=()):
        """Go on with what was done in a folder; `files`: what stages depend on, besides CLIP and GPT-2."""
        self.out, self.seconds = Path(out), {}
        self.stamps = self.out / "stages.json"
        self.weights = weights_digest(files)
        self.done = read_json(self.stamps) if self.stamps.exists() else {}

    def run(self, name, command, outputs, work, makes=None):
        """Do one stage.

        Args:
            name: what is printed and timed.
            command: str; a stage is skipped where it was done with the same command and `outputs` exist.
            outputs: paths that the stage writes.
            work: callable without arguments.
            makes: what the stage makes and what for, in words to print.
        """
        if makes:
            print(f"\n[{name}] makes {makes}", flush=True)
        print(f"[{name}] {command}", flush=True)
        key = f"{command} # weights {self.weights}"
        if self.done.get(name) == key and all(Path(p).exists() for p in outputs):
            print(f"[{name}] done before, skipped", flush=True)
            return
        began = time.monotonic()
        work()
        missing = [str(p) for p in outputs if not Path(p).exists()]
        if missing:
            raise FileNotFoundError(f"stage {name} did not write {', '.join(missing)}")
        self.seconds[name] = time.monotonic() - began
        print(f"[{name}] {self.seconds[name]:.0f} s", flush=True)
        # what follows a stage that ran again must run again too
        names = list(self.done)
        kept = names[: names.index(name)] if name in names else names
        self.done = {n: self.done[n] for n in kept} | {name: key}
        write_json(self.stamps, self.done)

    def script(self, name, arguments, outputs, makes=None):
        """Run one of the repository's commands as a stage, from the repository's root; arguments as of `run`."""
        shown = shlex.join(["python", *map(str, arguments)])
        command = [sys.executable, *map(str, arguments)]
        self.run(name, shown, outputs, lambda: subprocess.run(command, cwd=ROOT, check=True), makes)


@contextlib.contextmanager
def stages_in(out, files=()):
    """Yield the Stages of a folder, from the repository's root; a command that fails has printed why.

    Args:
        out, files: as of Stages.
    """
    out = Path(os.path.relpath(out.resolve(), ROOT))  # commands and files name no absolute path
    os.chdir(ROOT)
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield Stages(out, files)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {shlex.join(error.cmd[1:])} failed")


def draw_world(stages, scenes, test):
    """Draw the train and test splits; returns the test split's paths."""
    world = stages.out / "world"
    for split, number, purpose in (("train", scenes, "to learn from"), ("test", test, "that training never sees")):
        files = [world / f"captions_{split}.json", world / f"scenes_{split}.json"]
        stages.run(
            f"draw {split}", f"{number} scenes -> {world / split}", files,
            lambda split=split, number=number: write_split(split, number, world, processes=2),
            f"pictures with five captions each, {purpose}",
        )  # fmt: skip
    return world


def train_variant(stages, variant, store, test_images, epochs):
    """Train one variant and caption the test split with it; returns the captions json."""
    folder = stages.out / variant.name
    checkpoint = folder / f"{variant.name}_latest.pt"
    captions = stages.out / f"captions_{variant.name}.json"
    stages.script(f"train {variant.name}", [
        "train.py", "--data", store, "--out_dir", folder, "--prefix", variant.name,
        "--language_model", LANGUAGE_MODEL, "--epochs", epochs or variant.epochs,
        "--save_every", 100, *TRAINING, *variant.flags,
    ], [checkpoint],
        "the captioner: a mapping network that turns an embedding into a prefix, which GPT-2 goes on from")  # fmt: skip
    stages.script(f"predict {variant.name}", [
        "predict.py", test_images, "--checkpoint", checkpoint, "--out", captions,
    ], [captions], "a caption of each test picture, from the picture alone")  # fmt: skip
    return captions


def save_weights(out, variant, folder):
    """Write a trained variant as the captioner `demo` that comes with the repository, in fp16.

    Args:
        out: Path of the demo's output.
        variant: the Variant to keep.
        folder: Path of the weights' folder; the checkpoint names CLIP and GPT-2 relative to it.
    """
    state = load_weights(out / variant.name / f"{variant.name}_latest.pt")
    state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    config = read_json(out / variant.name / f"{variant.name}.json")
    config["model"] |= {"language_model": Path(LANGUAGE_MODEL).name, "clip_model_type": Path(CLIP).name}
    write_checkpoint(folder / "demo_latest.pt", state)
    write_json(folder / "demo.json", config)
    print(f"{folder / 'demo_latest.pt'}: {(folder / 'demo_latest.pt').stat().st_size / 1e6:.2f} MB")


def run_demo(stages, size):
    """Run everything.

    Args:
        stages: Stages of the folder to write.
        size: Size.
    Returns: the figures of report.json.
    """
    began, out = time.monotonic(), stages.out
    print(
        f"{size.scenes:,} training scenes and {size.test:,} test scenes are drawn, encoded by a small CLIP, "
        f"{' and '.join(v.title for v in size.variants)} trained on them, and the test scenes captioned: {size.takes}"
    )
    world, store = draw_world(stages, size.scenes, size.test), out / "train.pkl"
    stages.script("parse", [
        "parse_coco.py", "--clip_model_type", CLIP, "--annotations", world / "captions_train.json",
        "--images", world / "train", "--out", store,
    ], [store], "the feature store: CLIP's embedding of each training picture, computed once")  # fmt: skip
    variants = {v.title: train_variant(stages, v, store, world / "test", size.epochs) for v in size.variants}
    print("\n[report] makes the page: each caption read back and compared with what was drawn", flush=True)
    results = write_report(world / "scenes_test.json", variants, world / "test", out / "report.html")
    print("\n".join(summary_lines(results)))
    print(f"{out / 'report.html'}; {time.monotonic() - began:.0f} s in all")
    return results


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Run the whole way on the synthetic world.")
    parser.add_argument("--out", type=Path, default=Path("demo/out"), help="folder to write")
    parser.add_argument("--scenes", type=int, help="training scenes (default: 4000; 9000 with --full)")
    parser.add_argument("--test", type=int, help="test scenes (default: 500; 1000 with --full)")
    size = parser.add_mutually_exclusive_group()
    for name in ("short", "full"):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=SIZES[name].takes)
    parser.set_defaults(size="usual")
    parser.add_argument("--save_weights", action="store_true", help="keep the MLP variant as the captioner `demo`")
    return parser


def main(argv=None):
    """Run the demo the command line asks for."""
    args = get_parser().parse_args(argv)
    size = SIZES[args.size]
    with stages_in(args.out) as stages:
        run_demo(stages, replace(size, scenes=args.scenes or size.scenes, test=args.test or size.test))
    if args.save_weights:
        save_weights(stages.out, VARIANTS[0], (ROOT / CLIP).parent)


if __name__ == "__main__":
    main()
