"""Scenes of one to six objects, for what one vector an image cannot hold: drawn, captioned, judged.

Input: nothing. Objects lie in the cells of a 3 x 3 grid; a caption names them in reading order: "A small red star, a
large blue ring on the grass." Splits: `train` has one to six objects, `ordinary` one or two, `crowded` four to six.
"""

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.world.captions import PLACES
from demo.world.draw import JPEG_QUALITY, SIZE, draw_scene
from demo.world.scenes import BACKGROUNDS, COLOURS, KINDS, SIZES, Group
from utils.files import write_json

OBJECTS = {"train": (1, 6), "ordinary": (1, 2), "crowded": (4, 6)}  # fewest and most of a scene
FIRST_ID = {"train": 1, "ordinary": 500001, "crowded": 600001}
SEEDS = {"train": 21, "ordinary": 22, "crowded": 23}
SIDE = 3  # cells of the grid's side
RADIUS = {"small": (9.0, 11.5), "large": (16.5, 19.5)}  # pixels
JITTER = 4.0  # pixels, of a centre in its cell
NAMED = re.compile(rf"\ba ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b")
PLACE_OF = {words: background for background, wordings in PLACES.items() for words in wordings}


@dataclass(frozen=True)
class CrowdedScene:
    """Objects in cells, in reading order; no two have the same colour and kind."""

    groups: tuple
    cells: tuple
    background: str


def sample_crowded(rng, fewest, most):
    """Draw a scene of `fewest` to `most` objects."""
    number = int(rng.integers(fewest, most + 1))
    looks = rng.choice(len(COLOURS) * len(KINDS), number, replace=False)
    sizes = rng.integers(0, len(SIZES), number)
    groups = tuple(
        Group(1, SIZES[size], COLOURS[look // len(KINDS)], KINDS[look % len(KINDS)])
        for look, size in zip(looks, sizes, strict=True)
    )
    cells = tuple(sorted(rng.choice(SIDE * SIDE, number, replace=False).tolist()))
    return CrowdedScene(groups, cells, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def split_scenes(split, number):
    """Return the scenes of a split, [(image_id, CrowdedScene, seed)]; a longer split begins with the shorter one."""
    rows = []
    for i in range(number):
        seed = (SEEDS[split], i)
        rows.append((FIRST_ID[split] + i, sample_crowded(np.random.default_rng(seed), *OBJECTS[split]), seed))
    return rows


def in_cells(scene, rng):
    """Lay a scene's objects into their cells; returns as `demo.world.draw.place`."""
    cell = np.array(scene.cells)
    centres = (np.stack([cell % SIDE, cell // SIDE], 1) + 0.5) * SIZE / SIDE
    radii = np.array([rng.uniform(*RADIUS[group.size]) for group in scene.groups])
    return centres + rng.uniform(-JITTER, JITTER, centres.shape), radii, np.arange(len(cell))


def draw_crowded(scene, seed):
    """Draw a scene; returns an RGB PIL image."""
    return draw_scene(scene, (*seed, 1), layout=in_cells)


def caption_crowded(scene, rng):
    """Return a caption of a scene; only how the place is worded is drawn."""
    named = ", ".join(f"a {group.size} {group.colour} {group.kind}" for group in scene.groups)
    places = PLACES[scene.background]
    return f"A{named[1:]} {places[int(rng.integers(len(places)))]}."


def judge_crowded(caption, scene):
    """Compare a caption with a scene, whatever the order of its objects.

    Returns: (share of objects named right, of those that are there or of those that are named, if these are more;
        whether all of them and the background are right and nothing else is said).
    """
    text = caption.strip().lower().removesuffix(".")
    said = ["a {} {} {}".format(*match.groups()) for match in NAMED.finditer(text)]
    true = [f"a {group.size} {group.colour} {group.kind}" for group in scene.groups]
    right = sum(name in said for name in true)
    words = next((words for words in PLACE_OF if text == f"{', '.join(said)} {words}"), None)
    share = right / max(len(true), len(said))
    return share, share == 1 and PLACE_OF.get(words) == scene.background


def _render(job):
    scene, seed, path = job
    draw_crowded(scene, seed).save(path, format="JPEG", quality=JPEG_QUALITY)


def write_crowded(split, number, out, processes=2):
    """Draw and caption a split into `out`/`split` and `out`/captions_`split`.json; returns (folder, json)."""
    folder, captions = Path(out) / split, Path(out) / f"captions_{split}.json"
    folder.mkdir(parents=True, exist_ok=True)
    rows = split_scenes(split, number)
    jobs = [(scene, seed, folder / f"{image_id:06d}.jpg") for image_id, scene, seed in rows]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(_render, jobs, chunksize=64))
    texts = [caption_crowded(scene, np.random.default_rng((*seed, 2))) for _, scene, seed in rows]
    heads = [{"id": image_id, "file_name": f"{image_id:06d}.jpg"} for image_id, _, _ in rows]
    annotations = [
        {"image_id": head["id"], "id": number, "caption": text}
        for number, (head, text) in enumerate(zip(heads, texts, strict=True), 1)
    ]
    write_json(captions, {"images": heads, "annotations": annotations})
    return folder, captions
