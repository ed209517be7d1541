"""The synthetic world: scenes, captions, the judge, the splits and the weights that come with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script

from demo import report
from demo.world.captions import PAIR_FORMS, SINGLE_FORMS, judge, parse_caption, write_caption, write_captions
from demo.world.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SIZES,
    Group,
    Scene,
    edit_scene,
    is_unseen,
    is_valid,
    sample_scene,
)
from demo.world.splits import FIRST_ID, split_scenes, write_split

WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"
PAIR = Scene((Group(1, "small", "red", "star"), Group(2, "large", "blue", "circle")), "left", "grass")
PAIR_CAPTION = "A small red star to the left of two large blue circles on grass."


def scenes(number, unseen=False, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, unseen) for _ in range(number)]


def wrong(caption, scene):
    verdict = judge(caption, scene)
    return {name for name in ATTRIBUTES if verdict[name] is False}


# ---------------------------------------------------------------- captions and judge
def test_every_caption_is_all_right_about_its_own_scene():
    rng = np.random.default_rng(1)
    for scene in scenes(400) + scenes(100, unseen=True):
        for caption in write_captions(scene, rng, 5):
            assert parse_caption(caption) == scene, caption
            assert judge(caption, scene)["all"], caption


def test_captions_of_a_scene_differ():
    for scene in scenes(50):
        assert len(set(write_captions(scene, np.random.default_rng(2), 5))) == 5


def test_one_changed_attribute_is_wrong_in_exactly_that_attribute():
    rng = np.random.default_rng(3)
    options = {"count": (1, 2, 3), "size": SIZES, "colour": COLOURS, "kind": KINDS}
    for scene in scenes(300):
        for name, values in options.items():
            i = int(rng.integers(len(scene.groups)))
            value = next(
                v for v in rng.permutation(np.array(values, dtype=object)) if v != getattr(scene.groups[i], name)
            )
            groups = list(scene.groups)
            groups[i] = replace(groups[i], **{name: value})
            edited = replace(scene, groups=tuple(groups))
            assert wrong(write_caption(edited, rng), scene) == {name}, (scene, edited)
        background = next(b for b in BACKGROUNDS if b != scene.background)
        assert wrong(write_caption(replace(scene, background=background), rng), scene) == {"background"}
        if scene.relation:
            turned = replace(scene, groups=scene.groups[::-1])
            assert wrong(write_caption(turned, rng), scene) == {"relation"}
            other = replace(scene, relation="above" if scene.relation == "left" else "left")
            assert wrong(write_caption(other, rng), scene) == {"relation"}


def test_direction_of_mention_does_not_matter():
    assert judge("Two large blue circles are right of a small red star on the grass.", PAIR)["all"]
    assert judge("ON GRASS, one little star in red left of two big circles in blue", PAIR)["all"]
    assert wrong("Two large blue circles left of a small red star on grass.", PAIR) == {"relation"}


def test_swapped_attributes_are_wrong():
    assert wrong("A small blue star left of two large red circles on grass.", PAIR) == {"colour"}
    assert wrong("A large red star left of two small blue circles on grass.", PAIR) == {"size"}
    assert not judge("A small red circle left of two large blue stars on grass.", PAIR)["all"]


@pytest.mark.parametrize("caption", [
    "", "a dog", "a small red star", PAIR_CAPTION + " " + PAIR_CAPTION, "two small red star on grass.",
    "A small red star left of two large blue circles.", "A red star left of two large blue circles on grass.",
])  # fmt: skip
def test_missing_or_unreadable_is_wrong_in_everything(caption):
    assert wrong(caption, PAIR) == set(ATTRIBUTES)
    assert not judge(caption, PAIR)["all"]


def test_a_group_too_few_or_too_many_is_wrong():
    assert wrong("A small red star on grass.", PAIR) == {"count", "kind", "colour", "size", "relation"}
    single = Scene((PAIR.groups[0],), None, "grass")
    verdict = judge(PAIR_CAPTION, single)
    assert verdict["count"] is False and verdict["relation"] is None and not verdict["all"]


# ---------------------------------------------------------------- scenes, splits, pictures
def test_kept_combinations_are_in_the_test_split_only():
    for split in ("train", "val"):
        assert not any(is_unseen(s) for _, s, _ in split_scenes(split, 1500))
    unseen = [is_unseen(s) for _, s, _ in split_scenes("test", 200)]
    assert sum(unseen) == 50
    rng = np.random.default_rng(4)
    assert not any(is_unseen(edit_scene(s, rng)) for s in scenes(300))


def test_splits_depend_on_their_seed_only_and_do_not_share_ids():
    assert split_scenes("val", 20) == split_scenes("val", 40)[:20]
    ids = [i for split in FIRST_ID for i, _, _ in split_scenes(split, 50)]
    assert len(set(ids)) == 50 * len(FIRST_ID)


def test_edits_change_the_meaning_and_stay_valid():
    rng = np.random.default_rng(5)
    for scene in scenes(200):
        edited = edit_scene(scene, rng)
        assert edited != scene and is_valid(edited)
        assert sum(g.count for g in edited.groups) <= 3


def test_pictures_are_deterministic_and_keep_the_relation():
    from demo.world.draw import SIZE, draw_scene, place

    scene = scenes(1)[0]
    one, two = draw_scene(scene, 7), draw_scene(scene, 7)
    assert one.size == (SIZE, SIZE) and one.tobytes() == two.tobytes()
    assert one.tobytes() != draw_scene(scene, 8).tobytes()
    for i, scene in enumerate(s for s in scenes(200) if s.relation):
        xy, radius, group = place(scene, np.random.default_rng(i))
        axis = 0 if scene.relation == "left" else 1
        assert xy[group == 0, axis].max() < xy[group == 1, axis].min()
        assert (xy - radius[:, None] >= 0).all() and (xy + radius[:, None] <= SIZE).all()


def test_written_split_is_coco_json_and_reports(tmp_path):
    paths = write_split("test", 8, tmp_path, processes=1)
    data = json.loads(paths["captions"].read_text())
    assert [i["file_name"] for i in data["images"]][:2] == ["200001.jpg", "200002.jpg"]
    assert len(data["annotations"]) == 40 and set(data["annotations"][0]) == {"image_id", "id", "caption"}
    records = json.loads(paths["scenes"].read_text())
    first = {a["image_id"]: a["caption"] for a in reversed(data["annotations"])}
    assert all(judge(first[r["image_id"]], Scene.from_json(r))["all"] for r in records)

    said = tmp_path / "said.json"
    rows = [{"image_id": i, "caption": c} for i, c in first.items()]
    rows[0]["caption"] = "<script>alert(1)</script>"
    said.write_text(json.dumps(rows))
    figures = report.write_report(paths["scenes"], {"references": said}, paths["images"], tmp_path / "report.html")
    assert figures["references"]["all scenes"]["all"]["right"] == 7
    assert figures["references"]["unseen combinations"]["scenes"] == 2
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "http" not in page and "--checkpoint coco" in page
    assert json.loads((tmp_path / "report.json").read_text()) == figures
    titles = ("all scenes (8 scenes)", "seen combinations (6 scenes)", "unseen combinations (2 scenes)")
    places = [page.index(title) for title in titles]  # every share stands under the number of its scenes
    assert places == sorted(places)
    lines = [line.split("  ")[0] for line in report.summary_lines(figures)]
    assert [line for line in lines if "(" in line] == [
        "all scenes (8)", "seen combinations (6)", "unseen combinations (2)",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", (320, 390, 1600))
def test_no_cell_of_the_report_is_cut_off(width, browser, tmp_path):
    paths = write_split("test", 8, tmp_path, processes=1)
    said = tmp_path / "said.json"
    said.write_text(
        json.dumps([{"image_id": r["image_id"], "caption": ""} for r in json.loads(paths["scenes"].read_text())])
    )
    report.write_report(paths["scenes"], {"MLP + fine-tuned GPT-2": said}, paths["images"], tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.goto((tmp_path / "report.html").as_uri())
    cut = """() => [...document.querySelectorAll("td")].filter((cell) =>
        cell.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        || cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.innerText)"""
    assert page.locator("td").count() > 40 and page.evaluate(cut) == []


# ---------------------------------------------------------------- weights
def test_weights_are_small():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert (WEIGHTS / "clip.pt").stat().st_size + sum(p.stat().st_size for p in (WEIGHTS / "gpt2").iterdir()) <= 7e6


def test_clip_loads_and_tells_scenes_apart():
    import clip

    from demo.world.draw import draw_scene

    model, preprocess = clip.load(str(WEIGHTS / "clip.pt"), device="cpu")
    chosen = scenes(8, seed=6)
    rng = np.random.default_rng(6)
    images = torch.stack([preprocess(draw_scene(s, (6, i))) for i, s in enumerate(chosen)])
    text = clip.tokenize([write_caption(s, rng) for s in chosen])
    with torch.no_grad():
        image_logits, _ = model(images, text)
    assert (image_logits.argmax(1) == torch.arange(8)).sum() >= 6


def test_clip_training_words_are_clips_own():
    import clip

    from demo.world.clip_parts import Words

    words, rng = Words(), np.random.default_rng(7)
    for scene in scenes(50):
        caption = write_caption(scene, rng)
        ids = [i for i in words.encode([caption])[0].tolist() if i]
        assert [words.ids[i] for i in ids] == [i for i in clip.tokenize(caption)[0].tolist() if i]


def test_gpt2_loads_and_its_tokens_round_trip():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "gpt2")
    assert model.config.n_embd % 8 == 0 and model.config.n_positions == 128
    assert tokenizer.eos_token_id is not None and len(tokenizer) == model.config.vocab_size
    rng = np.random.default_rng(8)
    for scene in scenes(100) + scenes(20, unseen=True):
        caption = write_caption(scene, rng)
        ids = tokenizer.encode(caption)
        assert tokenizer.decode(ids) == caption
        assert tokenizer.decode(ids[-1:]) == "." and len(ids) <= 40


def test_first_sample_is_captioned_rightly():
    """It is what a newcomer sees first, and a picture of the test split like the others."""
    samples = sorted((WEIGHTS.parent / "images").iterdir())
    scene = {image_id: scene for image_id, scene, _ in split_scenes("test", 50)}[int(samples[0].stem)]
    said = run_script("predict.py", samples[0], "--checkpoint", "demo", "--num_workers", 0).stdout.split("\t")[1]
    assert len(samples) == 11 and judge(said, scene)["all"], said


def test_grammar_mentions_every_attribute():
    for form in SINGLE_FORMS:
        assert "{a}" in form and "{place}" in form
    for form in PAIR_FORMS:
        assert all(part in form for part in ("{a}", "{b}", "{rel}", "{place}"))
