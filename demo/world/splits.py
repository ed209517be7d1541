"""The splits of the synthetic world: which scenes they hold, and their pictures and captions as files.

Output per split: `<split>/000123.jpg`, `captions_<split>.json` (COCO annotations) and `scenes_<split>.json` (what is
really in the picture, for the judge).
"""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demo.world.captions import write_captions
from demo.world.draw import JPEG_QUALITY, draw_scene
from demo.world.scenes import Scene, is_unseen, sample_scene
from utils.files import write_json

FIRST_ID = {"train": 1, "val": 100001, "test": 200001, "adapt": 300001}
SPLIT_SEED = {"train": 11, "val": 12, "test": 13, "adapt": 14}
CAPTIONS_PER_IMAGE = 5
SHARE_UNSEEN = 0.25  # of the test split
SHARES_UNSEEN = {"train": 0, "val": 0, "test": SHARE_UNSEEN, "adapt": 0.5}  # "adapt": photos that nobody captioned


class Job(NamedTuple):
    """One picture to draw and save."""

    scene: Scene
    seed: tuple
    path: str


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
    return write_captions(scene, np.random.default_rng((*seed, 2)), CAPTIONS_PER_IMAGE)


def _render(job):
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
