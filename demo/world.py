"""The made world: what a scene may hold, which combinations are kept for testing, the splits.

    python -m demo.world --out demo/out/world --train 9000 --val 400 --test 1000

Input: nothing. Output per split: `<split>/000123.jpg`, `captions_<split>.json` (COCO
annotations) and `scenes_<split>.json` (what is really in the picture, for the judge).
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import write_json

KINDS = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("grass", "sand", "snow", "night sky", "brick wall")
RELATIONS = ("left", "above")  # "right" and "below" are these, read from the other end
ATTRIBUTES = ("count", "kind", "colour", "size", "relation", "background")

# Kept for the test split: no picture or caption of the others holds any of these.
UNSEEN_COLOUR_KINDS = frozenset({("purple", "star"), ("yellow", "heart"), ("red", "triangle"), ("blue", "ring")})
UNSEEN_RELATIONS = frozenset(
    {
        ("circle", "left", "square"),
        ("square", "above", "star"),
        ("heart", "left", "triangle"),
        ("ring", "above", "circle"),
    }
)
FIRST_ID = {"train": 1, "val": 100001, "test": 200001, "adapt": 300001}
SPLIT_SEED = {"train": 11, "val": 12, "test": 13, "adapt": 14}
CAPTIONS_PER_IMAGE = 5
SHARE_UNSEEN = 0.25  # of the test split
SHARES_UNSEEN = {"train": 0, "val": 0, "test": SHARE_UNSEEN, "adapt": 0.5}  # "adapt": photos that nobody captioned
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Group:
    """Equal objects that are mentioned together: "two small red stars"."""

    count: int
    size: str
    colour: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One group, or two groups where the first is `relation` ("left", "above") the second."""

    groups: tuple
    relation: str | None
    background: str

    def to_json(self):
        """Return the scene as plain json values."""
        groups = [vars(g) for g in self.groups]
        return {"groups": groups, "relation": self.relation, "background": self.background}

    @staticmethod
    def from_json(record):
        """Read what `to_json` wrote; other keys are ignored."""
        groups = tuple(Group(**g) for g in record["groups"])
        return Scene(groups, record["relation"], record["background"])


class Job(NamedTuple):
    """One picture to draw and save."""

    scene: Scene
    seed: tuple
    path: str


def is_unseen(scene):
    """Say whether a scene holds a combination that is kept for testing."""
    if any((g.colour, g.kind) in UNSEEN_COLOUR_KINDS for g in scene.groups):
        return True
    if scene.relation is None:
        return False
    a, b = scene.groups
    return (a.kind, scene.relation, b.kind) in UNSEEN_RELATIONS


def is_valid(scene):
    """Say whether two groups can be told apart by a caption."""
    if len(scene.groups) == 1:
        return True
    a, b = scene.groups
    return (a.size, a.colour, a.kind) != (b.size, b.colour, b.kind)


def _choice(rng, options):
    return options[int(rng.integers(len(options)))]


def _sample_any(rng):
    """Draw a scene without regard to the kept combinations."""
    if rng.random() < 0.3:
        counts, relation = (int(rng.choice([1, 2, 3], p=[0.26, 0.37, 0.37])),), None
    else:
        counts = _choice(rng, ((1, 1), (1, 1), (1, 2), (2, 1)))
        relation = _choice(rng, RELATIONS)
    groups = tuple(Group(c, _choice(rng, SIZES), _choice(rng, COLOURS), _choice(rng, KINDS)) for c in counts)
    return Scene(groups, relation, _choice(rng, BACKGROUNDS))


def sample_scene(rng, unseen=False):
    """Draw a valid scene that holds (`unseen`) or does not hold a kept combination."""
    while True:
        scene = _sample_any(rng)
        if is_valid(scene) and is_unseen(scene) == unseen:
            return scene


def edit_scene(scene, rng):
    """Return a scene that differs in one respect: a hard negative, never a kept combination.

    The respects: one attribute of one group, the relation, the background, or an attribute
    exchanged between the two groups.
    """
    two = len(scene.groups) == 2
    while True:
        what = _choice(rng, ("count", "size", "colour", "kind", "background") + ("relation", "swap", "swap") * two)
        edited = _edit(scene, what, rng)
        if edited != scene and is_valid(edited) and not is_unseen(edited):
            return edited


def _edit(scene, what, rng):
    """Return `scene` with one respect drawn anew; the result may be equal or not allowed."""
    if what == "background":
        return replace(scene, background=_choice(rng, BACKGROUNDS))
    groups = list(scene.groups)
    if what == "relation":
        turned = tuple(groups[::-1]) if rng.random() < 0.5 else scene.groups
        return replace(scene, groups=turned, relation=_choice(rng, RELATIONS))
    if what == "swap":
        field = _choice(rng, ("size", "colour", "colour", "kind", "count"))
        a, b = groups
        groups = [replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)})]
        return replace(scene, groups=tuple(groups))
    i = int(rng.integers(len(groups)))
    options = {"size": SIZES, "colour": COLOURS, "kind": KINDS}
    if what == "count":
        others = sum(g.count for g in groups) - groups[i].count
        value = int(rng.integers(1, 4 - others))
    else:
        value = _choice(rng, options[what])
    groups[i] = replace(groups[i], **{what: value})
    return replace(scene, groups=tuple(groups))


def split_scenes(split, number):
    """Return the scenes of a split, [(image_id, Scene, seed)].

    A longer split begins with the shorter one. In "test" every fourth scene is unseen, in "adapt" every other.
    """
    rows, share = [], SHARES_UNSEEN[split]
    for i in range(number):
        seed = (SPLIT_SEED[split], i)
        unseen = share > 0 and (i + 1) % round(1 / share) == 0
        rows.append((FIRST_ID[split] + i, sample_scene(np.random.default_rng(seed), unseen), seed))
    return rows


def scene_captions(scene, seed):
    """Return the CAPTIONS_PER_IMAGE captions of a split's scene; `seed` as from `split_scenes`."""
    from demo.captions import write_captions

    return write_captions(scene, np.random.default_rng((*seed, 2)), CAPTIONS_PER_IMAGE)


def _render(job):
    from demo.draw import draw_scene

    if not os.path.exists(job.path):
        partial = f"{job.path}.{os.getpid()}.part"
        draw_scene(job.scene, job.seed + (1,)).save(partial, format="JPEG", quality=JPEG_QUALITY)
        os.replace(partial, job.path)


def write_split(split, number, out, processes=2):
    """Draw and caption a split; pictures that exist are kept.

    Args:
        split: "train", "val", "test" or "adapt".
        number: how many images.
        out: folder; see the module's docstring for what goes in.
        processes: how many to draw with.
    Returns: dict of paths: "images", "captions", "scenes".
    """
    out = Path(out)
    images = out / split
    images.mkdir(parents=True, exist_ok=True)
    rows = split_scenes(split, number)
    names = [f"{image_id:06d}.jpg" for image_id, _, _ in rows]
    jobs = [Job(scene, seed, str(images / name)) for (_, scene, seed), name in zip(rows, names, strict=True)]
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            list(pool.map(_render, jobs, chunksize=64))
    else:
        list(map(_render, jobs))
    annotations, scenes = [], []
    for image_id, scene, seed in rows:
        for caption in scene_captions(scene, seed):
            annotations.append({"image_id": image_id, "id": len(annotations) + 1, "caption": caption})
        scenes.append({"image_id": image_id, "unseen": is_unseen(scene), **scene.to_json()})
    heads = [{"id": image_id, "file_name": name} for (image_id, _, _), name in zip(rows, names, strict=True)]
    paths = {"images": images, "captions": out / f"captions_{split}.json", "scenes": out / f"scenes_{split}.json"}
    write_json(paths["scenes"], scenes)
    write_json(paths["captions"], {"images": heads, "annotations": annotations})
    return paths


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Draw the made world's splits.")
    parser.add_argument("--out", default="demo/out/world", help="folder to write")
    parser.add_argument("--train", type=int, default=9000, help="train images")
    parser.add_argument("--val", type=int, default=400, help="validation images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--adapt", type=int, default=0, help="images to adapt to")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    return parser


def main(argv=None):
    """Draw what the command line asks for."""
    args = get_parser().parse_args(argv)
    for split in (split for split in FIRST_ID if getattr(args, split)):
        paths = write_split(split, getattr(args, split), args.out, args.processes)
        print(f"{split}: {getattr(args, split)} images in {paths['images']}")


if __name__ == "__main__":
    main()
