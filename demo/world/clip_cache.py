"""Draw the synthetic world's CLIP training pictures once, as uint8 at the CLIP's input size.

    python -m demo.world.clip_cache --out demo/out/clip_cache --chunks 8

Output: `000.npy` [CHUNK, RESOLUTION, RESOLUTION, 3] with `000.json`, its scenes, per chunk.
Scenes come in families of four: a scene and three that differ from it in one respect, so
that a batch holds hard negatives on the image side and on the caption side.
"""

import argparse
import io
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from demo.world.draw import JPEG_QUALITY, draw_scene
from demo.world.scenes import Scene, edit_scene, sample_scene
from utils.files import read_json, write_json

CHUNK = 16000  # pictures a file
FAMILY = 4  # a scene and its edits
RESOLUTION = 96  # the CLIP's input side, in pixels
CACHE_SEED = 21  # apart from world.SPLIT_SEED


def family_scenes(chunk, index):
    """Return FAMILY scenes: one without kept combinations, and edits of it."""
    rng = np.random.default_rng((CACHE_SEED, chunk, index))
    base = sample_scene(rng)
    scenes = [base]
    while len(scenes) < FAMILY:
        edited = edit_scene(base, rng)
        if edited not in scenes:
            scenes.append(edited)
    return scenes


def as_seen_by_clip(image):
    """Return what CLIP's preprocessing makes of a saved picture, uint8 [R, R, 3]."""
    saved = io.BytesIO()
    image.save(saved, format="JPEG", quality=JPEG_QUALITY)
    resized = Image.open(saved).resize((RESOLUTION, RESOLUTION), Image.BICUBIC)
    return np.asarray(resized)


def _draw_families(job):
    """Draw the families `start` .. `stop` of a chunk: (uint8 [N, R, R, 3], scenes)."""
    chunk, start, stop = job
    pictures, scenes = [], []
    for index in range(start, stop):
        for member, scene in enumerate(family_scenes(chunk, index)):
            image = draw_scene(scene, (CACHE_SEED, chunk, index, member))
            pictures.append(as_seen_by_clip(image))
            scenes.append(scene.to_json())
    return np.stack(pictures), scenes


def write_chunk(out, chunk, pool):
    """Draw one chunk unless it is there; the json, written last, marks it complete."""
    out = Path(out)
    target = out / f"{chunk:03d}.npy"
    if target.with_suffix(".json").exists():
        return
    step = 100
    jobs = [(chunk, i, i + step) for i in range(0, CHUNK // FAMILY, step)]
    pieces, scenes = zip(*pool.map(_draw_families, jobs), strict=True)
    partial = out / f"{chunk:03d}.part.npy"
    np.save(partial, np.concatenate(pieces))
    os.replace(partial, target)
    write_json(target.with_suffix(".json"), [scene for piece in scenes for scene in piece])


def read_chunks(out):
    """Open the complete chunks.

    Returns: list of (memory-mapped uint8 [CHUNK, R, R, 3], list of Scene).
    """
    chunks = []
    for listing in sorted(Path(out).glob("[0-9][0-9][0-9].json")):
        scenes = [Scene.from_json(r) for r in read_json(listing)]
        chunks.append((np.load(listing.with_suffix(".npy"), mmap_mode="r"), scenes))
    return chunks


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Draw CLIP's training pictures.")
    parser.add_argument("--out", default="demo/out/clip_cache", help="folder to write")
    parser.add_argument("--chunks", type=int, default=8, help=f"files of {CHUNK} pictures")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    return parser


def main(argv=None):
    """Draw what the command line asks for."""
    args = get_parser().parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.processes) as pool:
        for chunk in range(args.chunks):
            write_chunk(args.out, chunk, pool)
            print(f"chunk {chunk}", flush=True)


if __name__ == "__main__":
    main()
