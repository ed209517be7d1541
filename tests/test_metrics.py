"""Scores: equal to pycocoevalcap's, with and without Java; intervals, comparison, CLIPScore."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from metrics import bootstrap, clipscore, coco, ptb, scripts
from metrics.coco import coco_scores, from_sums

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "coco"
JAVALESS = ("Bleu", "ROUGE_L", "CIDEr")
OFFICIAL = {"Bleu_1": 0.579, "Bleu_2": 0.404, "Bleu_3": 0.279, "Bleu_4": 0.191, "ROUGE_L": 0.396, "CIDEr": 0.600}

CAPTIONS = {
    1: "A man riding a wave on top of a surfboard.",
    2: "A cat is sitting on the window sill",
    3: "a red fire truck parked in front of a building, with 2 men",
    4: "Two dogs don't play with a frisbee in the park.",
    5: "a plate of food",
}
REFERENCES = {
    1: ["A surfer rides a big wave on his surfboard.", "A man on a surfboard riding a wave", "Man surfing in the sea!"],
    2: [
        "A black cat sits on a window sill.",
        "The cat's sitting by the window (inside)",
        "a cat looking out of a window",
    ],
    3: ["A red fire truck is parked in front of a building.", "Fire engine on St. Mary's street", "a truck by a house"],
    4: ["Two dogs playing with a frisbee.", "dogs catch a white frisbee in a park", "The dogs can't catch it"],
    5: ["Rice, beans and a salad on a white plate.", "A plate of food with rice", 'A dinner plate that says "yum"'],
}
# pycocoevalcap 1.2 with Java 17 on these captions
EXPECTED = {
    "Bleu_1": 0.8260869565037808,
    "Bleu_2": 0.6807456456893165,
    "Bleu_3": 0.5049198150677974,
    "Bleu_4": 0.3795936060551572,
    "ROUGE_L": 0.6862589632662668,
    "CIDEr": 1.9279600815766191,
}
EXPECTED_METEOR = 0.4352871314100565
EXPECTED_CIDER = [1.7997865467376584, 1.6365220429469007, 2.165524293359967, 1.378436935855071, 2.659530588983498]

# What Stanford's program and pycocoevalcap's list of punctuation leave of a text.
TOKENS = {
    "A man's dog, 'Rex', can't sit -- or stay...": "a man 's dog rex ca n't sit or stay",
    "(red) [blue] {x} 50% of $5.00 & #1": "-lrb- red -rrb- -lsb- blue -rsb- -lcb- x -rcb- 50 % of $ 5.00 & # 1",
    "Dr. Smith on Main St. at 5:30pm, i.e. 17:30": "dr. smith on main st. at 5:30 pm i.e. 17:30",
    "The U.S. and the T.V. on 1/2 of a red/grey wall": "the u.s. and the t.v. on 1/2 of a red/grey wall",
    "1 1/2 dogs cannot rock 'n' roll o'clock": "1\u00a01/2 dogs can not rock 'n' roll o'clock",
    "sign b. The end": "sign b the end",
    "sign b. the end": "sign b. the end",
    "No. 5 and no. Five": "no. 5 and no five",
    "LOTS OF UMBRELLA'S AT AT&T, WON'T THEY'RE": "lots of umbrella 's at at&t wo n't they 're",
    "\u201ccaf\u00e9\u201d \u2013 it\u2019s don\u2019t\u2026": "caf\u00e9 it 's do n't",
    "two\r\nlines\u2028and more": "two lines and more",
    "hello!!! what?! a,b 1,000": "hello !!! what ?! a b 1,000",
    "": "",
}


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """A machine without Java."""
    monkeypatch.setenv("PATH", str(tmp_path))
    coco.java_available.cache_clear()
    yield tmp_path
    coco.java_available.cache_clear()


def fake_java(folder, behaviour):
    """Put a `java` into a folder that tells its version and then does something else."""
    java = folder / "java"
    java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\nexec {behaviour}\n')
    java.chmod(0o755)


@pytest.fixture(scope="module")
def official():
    """COCO's published sample captions and the references of their images."""
    if not (SHARED / "captions_val2014.json.gz").is_file():
        pytest.skip(f"COCO's captions are not at {SHARED}")
    captions = {r["image_id"]: r["caption"] for r in json.loads((SHARED / "fakecap_results.json").read_text())}
    with gzip.open(SHARED / "captions_val2014.json.gz") as file:
        annotations = json.load(file)["annotations"]
    references = {}
    for annotation in annotations:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions, references, [annotation["caption"] for annotation in annotations]


def needs_java():
    if not coco.java_available():
        pytest.skip("there is no Java")


def test_tokens():
    assert dict(zip(TOKENS, ptb.tokenize(list(TOKENS)), strict=True)) == TOKENS
    assert ptb.tokenize([]) == []


def test_tokens_of_java():
    needs_java()
    assert dict(zip(TOKENS, coco.java_tokenize(list(TOKENS)), strict=True)) == TOKENS


def test_java_tokens_are_pycocoevalcaps():
    needs_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    theirs = PTBTokenizer().tokenize({i: [{"caption": c} for c in texts] for i, texts in REFERENCES.items()})
    ours = coco.java_tokenize([caption for texts in REFERENCES.values() for caption in texts])
    assert [caption for texts in theirs.values() for caption in texts] == ours


@pytest.mark.slow
def test_tokens_of_all_of_coco_val(official):
    needs_java()
    captions = official[2]
    ours, theirs = ptb.tokenize(captions), coco.java_tokenize(captions)
    assert len(captions) == 202654
    assert [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]] == []


def test_small_set_without_java():
    scores = coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python")
    assert scores.metrics == pytest.approx(EXPECTED, rel=1e-12)
    np.testing.assert_allclose(scores.per_image["CIDEr"], EXPECTED_CIDER, rtol=1e-12)
    assert scores.ids == list(CAPTIONS) and scores.tokenizer == "python" and not scores.unavailable


@pytest.mark.slow
def test_small_set_with_java():
    needs_java()
    captions = {**CAPTIONS, "whole": "A whole match", "empty": ""}
    references = {**REFERENCES, "whole": ["a whole match"], "empty": ["a ||| b"]}
    scores = coco_scores(captions, references, ("Bleu", "METEOR", "ROUGE_L", "CIDEr"))
    np.testing.assert_allclose(
        from_sums("METEOR", scores.statistics["METEOR"], 1)["METEOR"], scores.per_image["METEOR"]
    )
    first = scores.statistics["METEOR"][:5].sum(0, keepdims=True)
    assert from_sums("METEOR", first, 5)["METEOR"][0] == pytest.approx(EXPECTED_METEOR, rel=1e-9)
    total = scores.statistics["METEOR"].sum(0, keepdims=True)  # a whole match among others counts as no chunk
    assert from_sums("METEOR", total, 7)["METEOR"][0] == pytest.approx(scores.metrics["METEOR"], rel=1e-9)
    assert scores.tokenizer == "java" and scores.per_image["METEOR"][5:].tolist() == [1, 0]


def test_official_figures_without_java(official, no_java):
    scores = coco_scores(official[0], official[1], JAVALESS)
    assert scores.tokenizer == "python"
    assert {name: round(value, 3) for name, value in scores.metrics.items()} == OFFICIAL


@pytest.mark.slow
def test_official_figures_with_java(official):
    needs_java()
    scores = coco_scores(official[0], official[1], ("METEOR", *JAVALESS))
    assert scores.tokenizer == "java"
    assert {name: round(value, 3) for name, value in scores.metrics.items()} == {**OFFICIAL, "METEOR": 0.195}


def test_statistics_give_the_metric():
    scores = coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python")
    for name, statistics in scores.statistics.items():
        for metric, value in from_sums(name, statistics.sum(0, keepdims=True), len(CAPTIONS)).items():
            assert value[0] == pytest.approx(scores.metrics[metric], rel=1e-12)


def test_metrics_that_need_java_say_so(no_java):
    scores = coco_scores(CAPTIONS, REFERENCES)
    assert scores.metrics == pytest.approx(EXPECTED)
    assert set(scores.unavailable) == {"METEOR", "SPICE"} and "java" in scores.unavailable["METEOR"]
    with pytest.raises(ValueError, match="tokenizer java needs a Java runtime"):
        coco_scores(CAPTIONS, REFERENCES, tokenizer="java")


def test_spice_downloads_nothing(monkeypatch, tmp_path):
    from pycocoevalcap.spice import get_stanford_models as models

    monkeypatch.setattr(models, "SPICEDIR", str(tmp_path))
    monkeypatch.setattr(models, "urlretrieve", lambda *_: pytest.fail("a download was started"))
    monkeypatch.setattr(coco, "java_available", lambda: True)
    scores = coco_scores(CAPTIONS, REFERENCES, ["SPICE"], "python")
    assert scores.metrics == {} and "Stanford CoreNLP 3.6.0" in scores.unavailable["SPICE"]


def test_spice_values(monkeypatch):
    from pycocoevalcap.spice.spice import Spice

    scenes = [{"All": {"f": value}} for value in (0.1, 0.2, 0.3, 0.4, 0.5)]
    monkeypatch.setattr(Spice, "__init__", lambda self: None)
    monkeypatch.setattr(Spice, "compute_score", lambda self, gts, res: (0.3, scenes))
    monkeypatch.setattr(coco, "_require", lambda name: None)
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "")
    scores = coco_scores(CAPTIONS, REFERENCES, ["SPICE"], "python")
    assert scores.metrics == {"SPICE": 0.3} and scores.per_image["SPICE"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_ctrl_c_in_meteor_does_not_hang(monkeypatch, no_java):
    from pycocoevalcap.meteor.meteor import Meteor

    def interrupted(self, hypothesis, references):
        raise KeyboardInterrupt

    fake_java(no_java, "sleep 60")
    monkeypatch.setenv("PATH", f"{no_java}:/usr/bin:/bin")
    monkeypatch.setattr(Meteor, "_stat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        coco_scores(CAPTIONS, REFERENCES, ["METEOR"], "python")


def test_a_java_that_breaks_does_not_hang(no_java):
    fake_java(no_java, "false")
    scores = coco_scores(CAPTIONS, REFERENCES, ["METEOR"], "python")
    assert "failed" in scores.unavailable["METEOR"]
    with pytest.raises(ValueError, match="Stanford's tokenizer failed"):
        coco_scores(CAPTIONS, REFERENCES, JAVALESS, "java")


@pytest.mark.parametrize(
    ("captions", "references", "options", "message"),
    [
        ({}, REFERENCES, {}, "no captions"),
        ({9: "a"}, REFERENCES, {}, "no reference, as image_id 9"),
        ({9: "a"}, {9: ["."]}, {}, "no reference holds a word"),
        (CAPTIONS, REFERENCES, {"metrics": ["BLEU"]}, "unknown metric BLEU; there are Bleu"),
        (CAPTIONS, REFERENCES, {"tokenizer": "perl"}, "'perl' is none of"),
    ],
)
def test_bad_input(captions, references, options, message):
    with pytest.raises(ValueError, match=message):
        coco_scores(captions, references, **{"tokenizer": "python", **options})


def test_caption_statistics():
    statistics = coco.caption_statistics(["a dog", "a dog", "the red cat", ""], {"a dog"})
    assert statistics == {
        "mean_length_in_words": 1.75,
        "vocabulary_size": 5,
        "share_of_distinct_captions": 0.75,
        "share_repeated_from_training": 0.5,
    }


def worse():
    """Scores of captions that are worse for every image."""
    return coco_scores({i: c.split()[0] + " dog" for i, c in CAPTIONS.items()}, REFERENCES, JAVALESS, "python")


def test_bootstrap_resamples_bleu_from_its_counts():
    scores = coco_scores(CAPTIONS, REFERENCES, ["Bleu"], "python")
    counts = bootstrap._draw(np.random.default_rng(3), 1, 5)
    drawn = [image_id for image_id, count in zip(CAPTIONS, counts[0], strict=True) for _ in range(int(count))]
    again = coco_scores(
        {row: CAPTIONS[i] for row, i in enumerate(drawn)}, {row: REFERENCES[i] for row, i in enumerate(drawn)},
        ["Bleu"], "python",
    )  # fmt: skip
    values = from_sums("Bleu", counts @ scores.statistics["Bleu"], 5)
    assert {name: value[0] for name, value in values.items()} == pytest.approx(again.metrics, rel=1e-12)


def test_intervals():
    scores = coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python")
    spans = bootstrap.intervals(scores, 250, seed=1)
    assert spans == bootstrap.intervals(scores, 250, seed=1) != bootstrap.intervals(scores, 250, seed=2)
    assert list(spans) == list(scores.metrics)
    assert all(low < scores.metrics[name] < high for name, (low, high) in spans.items())


def test_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    scores = coco.Scores(list(range(400)), {}, {}, {"CIDEr": values[:, None]}, [], {}, "python")
    low, high = bootstrap.intervals(scores, 4000)["CIDEr"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_compare():
    scores = coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python")
    same = bootstrap.compare(scores, scores, 100)
    assert all(v == {"difference": 0, "interval": (0, 0), "p_value": 1} for v in same.values())
    better = bootstrap.compare(scores, worse(), 4000)
    # of the 2^5 ways to swap five pairs, two are as extreme as the one at hand
    assert better["CIDEr"]["p_value"] == pytest.approx(2 / 32, abs=0.015)
    assert better["CIDEr"]["interval"][0] > 0 and better["Bleu_4"]["difference"] > 0
    reverse = bootstrap.compare(worse(), scores, 4000)
    assert reverse["CIDEr"]["difference"] == -better["CIDEr"]["difference"]


def test_compare_refuses_other_images():
    first = coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python")
    other = coco_scores({1: "a"}, REFERENCES, JAVALESS, "python")
    with pytest.raises(ValueError, match="same images"):
        bootstrap.compare(first, other)


def test_clipscore():
    images = np.array([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    captions = np.array([[1.0, 0, 0], [0, 3, 4], [0, 0, -2]])
    scores = clipscore.clip_scores(images, captions)
    np.testing.assert_allclose(scores, [2.5, 1.5, 0])
    references = [np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[0, 0, 1.0]]), np.array([[1.0, 0, 0]])]
    harmonic = [2 * 2.5 * 1 / 3.5, 2 * 1.5 * 0.8 / 2.3, 0]
    np.testing.assert_allclose(clipscore.ref_clip_scores(images, captions, references), harmonic)
    with pytest.raises(ValueError, match="must match"):
        clipscore.clip_scores(images, captions[:2])
    with pytest.raises(ValueError, match="must match"):
        clipscore.ref_clip_scores(images, captions, references[:2])
    with pytest.raises(ValueError, match="shape"):
        clipscore.clip_scores(images[0], captions)


def test_cider_of_one_image_is_not_defined():
    """One image has every word of its references, so all weights are log(1) = 0."""
    scores = coco_scores({1: CAPTIONS[1]}, {1: [CAPTIONS[1]]}, JAVALESS, "python")
    assert scores.metrics["CIDEr"] is None and scores.metrics["Bleu_4"] == pytest.approx(1)
    assert np.isnan(scores.per_image["CIDEr"]).all() and "CIDEr" not in scores.statistics
    assert any("CIDEr is not defined on one image" in warning for warning in scores.warnings)
    gap = bootstrap.compare(scores, scores, 20)
    assert "CIDEr" not in gap and gap["Bleu_1"]["interval"] is None and gap["Bleu_1"]["p_value"] == 1


def test_cider_of_words_that_all_images_share_is_warned_of():
    same = {i: ["a dog runs on the beach"] for i in (1, 2)}
    scores = coco_scores({1: "a dog runs on the beach", 2: "a dog runs"}, same, JAVALESS, "python")
    assert scores.metrics["CIDEr"] == 0 and "have no weight" in scores.warnings[0]
    assert not coco_scores(CAPTIONS, REFERENCES, JAVALESS, "python").warnings
    assert not coco_scores({1: "one", 2: "two"}, same, JAVALESS, "python").warnings  # truly 0


SLEEPING = pytest.param("sh -c 'exec <&-; sleep 30'", marks=pytest.mark.slow)


@pytest.mark.parametrize("behaviour", ("true", "false", SLEEPING, "sh -c 'read line; kill -9 $$'"))
def test_a_java_that_dies_costs_only_what_needs_it(no_java, monkeypatch, behaviour):
    """Whether it ends, hangs up or is killed on its first line: the other metrics come with their values."""
    fake_java(no_java, behaviour)
    monkeypatch.setenv("PATH", f"{no_java}:/usr/bin:/bin")
    if "sleep" in behaviour:  # Stanford's tokenizer is waited for; METEOR's pipe breaks
        scores = coco_scores(CAPTIONS, REFERENCES, ("METEOR", *JAVALESS), "python")
    else:
        scores = coco_scores(CAPTIONS, REFERENCES, ("METEOR", *JAVALESS))
        assert scores.tokenizer == "python" and "Stanford's tokenizer failed" in scores.warnings[0]
    assert scores.metrics == pytest.approx(EXPECTED, rel=1e-12)
    assert list(scores.unavailable) == ["METEOR"] and "failed or was killed" in scores.unavailable["METEOR"]


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("一只狗在沙滩上跑", "Chinese"),
        ("一只狗, 在沙滩上跑。", "Chinese"),
        ("一只狗", "Chinese"),
        ("T恤男孩骑自行车", "Chinese"),
        ("犬がビーチを走っている。", "Japanese"),
        ("สุนัขวิ่งบนชายหาด และแมวนอนอยู่บนโซฟา", "Thai"),
        ("ໝາແລ່ນຢູ່ຫາດຊາຍ", "Lao"),
        ("ឆ្កែរត់លើឆ្នេរ", "Khmer"),
        ("ခွေးပြေးနေတယ်", "Burmese"),
        ("一 只 狗 在 沙滩 上 跑", None),
        ("スケートボード に 乗る 男", None),
        ("สุนัข วิ่ง บน ชายหาด", None),
        ("개가 해변을 달린다", None),
        ("개", None),
        ("dog", None),
        ("", None),
        ("Ein Hund läuft über den Strand", None),
        ("собака бежит по пляжу", None),
        ("a sign that says 出口请走这边", None),
    ],
)
def test_languages_without_blanks(caption, language):
    assert scripts.uncut_language(caption) == language


def test_uncut_warning_counts():
    assert scripts.uncut_warning({"captions": ["a dog"], "references": ["a cat"]}) is None
    warning = scripts.uncut_warning({"captions": ["a dog", "两个人骑自行车"], "references": ["a cat"]})
    assert warning.startswith("1 of 2 captions hold no blanks between words (Chinese?)") and "jieba" in warning
    both = scripts.uncut_warning({"captions": ["犬が走る浜辺です"], "references": ["犬が走る浜辺です"] * 3})
    assert both.startswith("1 of 1 captions and 3 of 3 references hold") and "fugashi" in both
