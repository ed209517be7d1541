"""Scenes of many objects, their captions and judge, and the experiment on tokens in its shortest form."""

import json

import numpy as np
import pytest

from demo import tokens
from demo.world.clip_parts import Words
from demo.world.crowded import OBJECTS, SIDE, caption_crowded, draw_crowded, judge_crowded, split_scenes
from demo.world.crowded_clip import CONTEXT, targets
from demo.world.draw import COLOUR_RGB, SIZE
from demo.world.scenes import COLOURS


def test_splits_hold_as_many_objects_as_they_say():
    for split, (fewest, most) in OBJECTS.items():
        scenes = [scene for _, scene, _ in split_scenes(split, 200)]
        assert {len(scene.groups) for scene in scenes} == set(range(fewest, most + 1))
        assert all(len({(g.colour, g.kind) for g in scene.groups}) == len(scene.groups) for scene in scenes)
        assert all(len(set(scene.cells)) == len(scene.groups) and max(scene.cells) < 9 for scene in scenes)


def test_a_longer_split_begins_with_the_shorter_one():
    assert split_scenes("crowded", 7)[:3] == split_scenes("crowded", 3)


def test_captions_are_judged():
    _, scene, _ = split_scenes("crowded", 1)[0]
    caption = caption_crowded(scene, np.random.default_rng(0))
    names = [f"a {g.size} {g.colour} {g.kind}" for g in scene.groups]
    place = caption.rsplit(names[-1], 1)[1]
    number = len(names)
    assert judge_crowded(caption, scene) == (1, True)
    assert judge_crowded(", ".join(names[::-1]) + place, scene) == (1, True)  # in any order
    assert judge_crowded(", ".join(names[1:]) + place, scene) == ((number - 1) / number, False)
    assert judge_crowded(", ".join([*names, names[0]]) + place, scene) == (number / (number + 1), False)
    assert judge_crowded(", ".join(names) + " on a table.", scene) == (1, False)
    assert judge_crowded("nonsense " + caption, scene) == (1, False)
    assert judge_crowded("", scene) == (0, False)


def test_every_caption_fits_the_text_tower():
    captions = [caption_crowded(scene, np.random.default_rng(0)) for _, scene, _ in split_scenes("crowded", 200)]
    assert Words().encode(captions).shape[1] <= CONTEXT


def test_objects_lie_in_the_cells_that_the_targets_say():
    """The middle of a cell that holds a full object has about its colour; four patches tell it."""
    rows = split_scenes("crowded", 20)
    present, there = targets([scene for _, scene, _ in rows])
    side, right = int(there.shape[2] ** 0.5), []
    for (_, scene, seed), own, looks in zip(rows, there[1].view(-1, side, side), present, strict=True):
        assert looks.sum() == len(scene.groups) and (own > 0).sum() == 4 * len(scene.groups)
        picture = np.asarray(draw_crowded(scene, seed), np.float32)
        plain = {g.colour for g in scene.groups if g.kind in ("circle", "square", "heart")}
        for y, x in np.argwhere(own.numpy()[::2, ::2] > 0):
            colour = COLOURS[own[2 * y, 2 * x] - 1]
            if colour in plain:
                pixel = picture[int((y + 0.5) * SIZE / SIDE), int((x + 0.5) * SIZE / SIDE)]
                distances = {name: np.abs(pixel - rgb).sum() for name, rgb in COLOUR_RGB.items()}
                right.append(min(distances, key=distances.get) == colour)
    assert len(right) > 40 and np.mean(right) > 0.5  # one in seven by chance


@pytest.mark.slow
def test_the_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens.main([
        "--out", str(tmp_path / "out"), "--scenes", "200", "--test", "8", "--clip_epochs", "1", "--steps", "4",
        "--epochs", "1", "--seeds", "0", "--readable", "0", "--networks", "pooled, mlp", "patches, resampler",
        "--learns", "frozen",
    ])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"pooled, mlp, frozen", "patches, resampler, frozen"}
    for runs in results.values():
        assert set(runs["0"]) == {"ordinary", "crowded"} and all(0 <= share <= 1 for share in runs["0"]["crowded"])
