"""evaluate.py: every format in, one clear line for bad input, scores, page and comparison out."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_script
from PIL import Image

import evaluate
import features.references
from encoders import load_encoder
from features.finder import ImageFinder
from features.loader import encode_files
from features.references import References
from metrics.coco import coco_scores
from metrics.evaluation import pick_examples

ROOT = Path(evaluate.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "coco"
FAST = ["--tokenizer", "python", "--metrics", "Bleu", "ROUGE_L", "CIDEr", "--bootstrap", "50"]
CAPTIONS = {1: "a cat on a mat", 2: "a dog runs", 60623: 'a <b>man</b> & "dog" <script>alert(1)</script>'}
REFERENCES = {
    1: ["A cat sits on a mat.", "a cat on the mat"],
    2: ["A dog is running.", "the dog runs"],
    60623: ["A man with a dog.", "<img src=x onerror=alert(1)>"],
}


def save(path, value):
    """Write a value as JSON, gzipped where the name says so; return the path as text."""
    text = value if isinstance(value, str) else json.dumps(value)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def result_file(path, captions=CAPTIONS):
    return save(path, [{"image_id": i, "caption": c} for i, c in captions.items()])


def coco_file(path, references=REFERENCES):
    annotations = [{"id": 9, "image_id": i, "caption": c} for i, texts in references.items() for c in texts]
    return save(path, {"info": {}, "images": [{"id": i} for i in references], "annotations": annotations})


def karpathy(splits):
    """A Karpathy file with one image per split name."""
    return {
        "dataset": "coco",
        "images": [
            {"cocoid": i, "filename": f"{i}.jpg", "split": s, "sentences": [{"raw": f"{s} {i}"}, {"raw": "a dog"}]}
            for i, s in enumerate(splits, 1)
        ],
    }


@pytest.fixture
def files(tmp_path):
    """Captions and references on disk."""
    return result_file(tmp_path / "captions.json"), coco_file(tmp_path / "references.json")


def test_reference_formats(tmp_path):
    listed = [{"image_id": str(i), "caption": c} for i, texts in REFERENCES.items() for c in texts]
    table = 'public_id,caption_gt\n1,A cat\n2,"a dog, running"\n'
    for path in (
        coco_file(tmp_path / "captions_val2014.json"),
        coco_file(tmp_path / "captions_val2014.json.gz"),
        save(tmp_path / "named.json", {"type": "captions", "annotations": listed}),
        save(tmp_path / "lines.jsonl", "\n".join(json.dumps({"image": f"{r['image_id']}.jpg", **r}) for r in listed)),
        save(tmp_path / "train_caption.json", listed),
    ):
        assert evaluate.read_references(path, "test").captions == REFERENCES
    expected = {1: ["A cat"], 2: ["a dog, running"]}
    assert evaluate.read_references(save(tmp_path / "nice.csv", "\ufeff" + table), "test").captions == expected
    assert evaluate.read_references(save(tmp_path / "nice.csv.gz", table), "test").captions == expected
    nice = [{"public_id": i, "caption_gt": texts[0]} for i, texts in expected.items()]
    assert evaluate.read_references(save(tmp_path / "nice.json", nice), "test").captions == expected
    path = save(tmp_path / "own.json", {str(i): texts[0] for i, texts in expected.items()})
    assert evaluate.read_references(path, "test").captions == expected


def test_karpathy_splits(tmp_path):
    path = save(tmp_path / "dataset_flickr.json", karpathy(["train", "restval", "val", "test", "test"]))
    assert evaluate.read_references(path, "test").captions == {4: ["test 4", "a dog"], 5: ["test 5", "a dog"]}
    assert list(evaluate.read_references(path, "train").captions) == [1, 2]
    with pytest.raises(ValueError, match="no split 'dev'"):
        evaluate.read_references(path, "dev")


def test_karpathy_coco_must_be_whole(tmp_path, monkeypatch):
    path = save(tmp_path / "dataset_coco.json", karpathy(["train", "restval", "test"]))
    with pytest.raises(ValueError, match="has 2 images in split train, not 113,287"):
        evaluate.read_references(path, "train")
    with pytest.raises(ValueError, match="not 5,000"):
        evaluate.read_references(path, "test")
    monkeypatch.setattr(features.references, "KARPATHY_COCO", {"train": 2})
    assert len(evaluate.read_references(path, "train").captions) == 2


def test_caption_formats(tmp_path):
    expected = {60623: "a dog", "beach": "the sea"}
    records = [{"image_id": "000000060623", "caption": "a dog"}, {"image_id": "beach", "caption": "the sea"}]
    for name, value in (
        ("coco.json", records),
        ("nice.json", {"60623": "a dog", "beach": "the sea"}),
        ("nice.csv", "public_id,caption\n60623,a dog\nbeach,the sea\n"),
    ):
        assert evaluate.read_captions(save(tmp_path / name, value), References({}, {}, {}), "test") == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.json", [{"image_id": 5, "caption": "a"}, {"image_id": "05", "caption": "b"}], "1 images .image_id 5."),
        ("a.json", '{"5": "a", "5": "b"}', "several captions"),
        ("a.json", '{"5": "a", "6": null}', "record 2 has the caption None"),
        ("a.json", '{"5": "a",', "a.json is not valid JSON"),
        ("a.json", {"5": ["a", "b"]}, "several captions for 1 images .image_id 5."),
        ("a.json", [{"image_id": 5, "caption": None}], "record 1 has the caption None"),
        ("a.json", [{"caption": "a"}], "record 1 has no 'image_id'"),
        ("a.json", [], "holds no captions"),
        ("a.csv", "public_id,text\n5,a\n", "has columns public_id, text"),
        ("a.csv", 'public_id,caption\n5,"a\n', "a.csv, line"),
        ("a.json.gz", "[{", "a.json.gz is not valid JSON"),
    ],
)
def test_bad_files(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        evaluate.read_captions(save(tmp_path / name, value), References({}, {}, {}), "test")


def test_damaged_gzip_and_missing_file(tmp_path):
    path = Path(coco_file(tmp_path / "a.json.gz"))
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:30] + b"xxxx" + whole[34:], b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no complete gzip file"):
            evaluate.read_references(path, "test")
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        evaluate.read_references(tmp_path / "nowhere.json", "test")


def test_empty_reference(tmp_path):
    with pytest.raises(ValueError, match="empty references for 1 images .image_id 1."):
        evaluate.read_references(coco_file(tmp_path / "a.json", {1: ["a", " "]}), "test")


def test_images_must_be_the_same(tmp_path, files, capsys):
    captions, references = files
    part = result_file(tmp_path / "part.json", {1: "a cat"})
    other = result_file(tmp_path / "other.json", {"x": "a cat"})
    evaluate.main([part, references, *FAST])
    assert "2 of 3 images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="references.json has no reference for 1 of 1 images .*image_id x"):
        evaluate.main([other, references, *FAST])
    with pytest.raises(ValueError, match="part.json has no caption for 2 of 3 images .*image_id 2, 60623.*--subset"):
        evaluate.main([captions, references, "--compare", part, *FAST])
    with pytest.raises(ValueError, match="no image is in all files"):
        evaluate.main([other, references, "--subset", *FAST])


def test_subset(tmp_path, files):
    part = result_file(tmp_path / "part.json", {1: "a cat", 2: "a dog", "x": "the sea"})
    out = tmp_path / "new" / "scores.json"
    evaluate.main([part, files[1], "--subset", "--out", str(out), *FAST])
    assert [image["image_id"] for image in json.loads(out.read_text())["per_image"]] == [1, 2]


def test_scores(tmp_path, files, capsys):
    training = save(tmp_path / "train.json", [{"image_id": 7, "caption": "A dog runs."}])
    out = tmp_path / "scores.json"
    evaluate.main([*files, "--out", str(out), "--train_captions", training, *FAST])
    result = json.loads(out.read_text())
    assert list(result["metrics"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert result["unavailable"] == {} and result["images"] == 3 and result["tokenizer"] == "python"
    assert result["statistics"]["share_repeated_from_training"] == pytest.approx(1 / 3)
    assert result["bootstrap"]["samples"] == 50 and len(result["intervals"]["CIDEr"]) == 2
    assert result["per_image"][0]["caption"] == "a cat on a mat" and "CIDEr" in result["per_image"][0]
    printed = capsys.readouterr().out
    assert f"CIDEr    {result['metrics']['CIDEr']:.3f}  " in printed and "vocabulary size" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "captions.json",
        "references.json",
        "scores.json",
        "train.json",
    ]


def test_without_bootstrap(tmp_path, files):
    out = tmp_path / "scores.json"
    evaluate.main([*files, "--out", str(out), *FAST[:-1], "0"])
    assert not {"bootstrap", "intervals"} & set(json.loads(out.read_text()))


def test_compare(tmp_path, files, capsys):
    other = result_file(tmp_path / "other.json", dict.fromkeys(CAPTIONS, "a cat on a mat"))
    out, page = tmp_path / "scores.json", tmp_path / "page.html"
    evaluate.main([*files, "--compare", other, "--out", str(out), "--html", str(page), *FAST])
    comparison = json.loads(out.read_text())["comparison"]
    metrics = json.loads(out.read_text())["metrics"]
    assert comparison["differences"]["CIDEr"]["difference"] == pytest.approx(
        metrics["CIDEr"] - comparison["metrics"]["CIDEr"]
    )
    assert "randomisation" in comparison["method"] and 0 < comparison["differences"]["CIDEr"]["p_value"] <= 1
    assert "Difference to other.json" in capsys.readouterr().out and "randomisation" in page.read_text()


def test_page(tmp_path, files):
    images, page = tmp_path / "images", tmp_path / "page.html"
    images.mkdir()
    Image.new("RGBA", (900, 600), "teal").save(images / "COCO_val2014_000000060623.png")
    (images / "000000000001.jpg").write_bytes(b"no image")
    evaluate.main([*files, "--html", str(page), "--images", str(images), *FAST])
    text = page.read_text(encoding="utf-8")
    assert text.count("src='data:image/jpeg;base64,") == 1 and text.count("<article") == 3
    assert "<script" not in text and "<img src=x" not in text and "&lt;<mark>script</mark>&gt;" in text
    assert not re.search(r"""<[^>]*(?:src|href)=['"]?(?!['"]?data:)|url\(|@import""", text)


def test_flags_that_cannot_work(tmp_path, files):
    for flags, message in (
        (["--out", str(tmp_path)], "is a folder"),
        (["--images", str(tmp_path)], "pass --html"),
        (["--clip_model_type", "ViT-B/32"], "pass --images"),
        (["--compare", files[0], "--bootstrap", "0"], "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([*files, *flags])
    with pytest.raises(FileNotFoundError, match="no image folder"):
        evaluate.main([*files, "--html", "p.html", "--images", str(tmp_path / "none"), *FAST])


def test_same_captions_warn(tmp_path, capsys):
    many = {i: ["a dog"] for i in range(30)}
    captions = result_file(tmp_path / "captions.json", dict.fromkeys(many, "a cat"))
    evaluate.main([captions, coco_file(tmp_path / "references.json", many), *FAST])
    assert "only 3.3% of the captions are distinct" in capsys.readouterr().err


def test_one_image(tmp_path, capsys):
    """CIDEr is not defined on it and nothing can be resampled: said in table, json, page and comparison."""
    captions = result_file(tmp_path / "captions.json", {1: "A dog runs."})
    references = coco_file(tmp_path / "references.json", {1: ["A dog runs.", "A brown dog by the sea."]})
    out, page = tmp_path / "scores.json", tmp_path / "page.html"
    evaluate.main([captions, references, "--compare", captions, "--out", str(out), "--html", str(page), *FAST])
    result, printed = json.loads(out.read_text()), capsys.readouterr()
    assert result["metrics"]["CIDEr"] is None and result["per_image"][0]["CIDEr"] is None
    assert result["metrics"]["Bleu_1"] == pytest.approx(1) and "intervals" not in result
    assert result["comparison"]["metrics"]["CIDEr"] is None and "CIDEr" not in result["comparison"]["differences"]
    assert re.findall(r"\nCIDEr +not defined on one image", printed.out) and "0.000 to" not in printed.out
    assert "warning: CIDEr is not defined on one image" in printed.err
    text = page.read_text()
    assert "not defined on one image" in text and "Best images by Bleu_1" in text and "nan" not in text
    evaluate.main([captions, references, "--metrics", "CIDEr", "--tokenizer", "python", "--html", str(page)])


def test_captions_without_blanks_warn(tmp_path, capsys):
    chinese = {1: ["一只棕色的狗在沙滩上跑"], 2: ["一只白猫在沙发上睡觉"], 3: ["两个人在路上骑自行车"]}
    captions = result_file(tmp_path / "captions.json", {i: texts[0] for i, texts in chinese.items()})
    references = coco_file(tmp_path / "references.json", chinese)
    evaluate.main([captions, references, "--quiet", *FAST])
    assert "3 of 3 captions and 3 of 3 references hold no blanks between words (Chinese?)" in capsys.readouterr().err
    english = result_file(tmp_path / "english.json", dict.fromkeys(chinese, "a dog"))
    evaluate.main([english, references, *FAST])
    assert "warning: 3 of 3 references hold no blanks" in capsys.readouterr().err
    evaluate.main([english, coco_file(tmp_path / "english_references.json", {i: ["dog"] for i in chinese}), *FAST])
    assert "blanks" not in capsys.readouterr().err


def test_examples_do_not_overlap(tmp_path):
    captions = {i: "a dog" if i % 2 else "a cat" for i in range(5)}
    scores = coco_scores(captions, {i: ["a dog"] for i in range(5)}, ["ROUGE_L"], "python")
    references = References({i: ["a dog"] for i in range(5)}, {}, {})
    best, worst = pick_examples(scores, [captions], references, 12)
    assert [e["image_id"] for e in best] == [1, 3, 0] and [e["image_id"] for e in worst] == [4, 2]
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    found, _ = pick_examples(scores, [captions], references, 1, ImageFinder([tmp_path]))
    assert found[0]["image"].startswith("data:image/jpeg")


def test_command_line(tmp_path, files):
    command = [sys.executable, str(ROOT / "evaluate.py")]
    done = subprocess.run([*command, files[0], str(tmp_path / "none.json")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none.json'} does not exist\n"
    text = evaluate.get_parser().format_help()
    assert "what is compared:" in text and "output:" in text


def test_coco_sample(tmp_path):
    if not (SHARED / "fakecap_results.json").is_file():
        pytest.skip(f"COCO's captions are not at {SHARED}")
    out = tmp_path / "scores.json"
    files = [str(SHARED / "fakecap_results.json"), str(SHARED / "captions_val2014.json.gz")]
    evaluate.main([*files, "--out", str(out), *FAST])
    metrics = json.loads(out.read_text())["metrics"]
    assert [f"{value:.3f}" for value in metrics.values()] == ["0.579", "0.404", "0.279", "0.191", "0.396", "0.600"]


def test_clip_scores(photos, clip_file, tmp_path):
    """CLIPScore and RefCLIPScore by hand, in json, table, page, comparison and intervals."""
    texts = {i: [f"a {word} circle", "a star on the sand"] for i, word in enumerate(("red", "blue", "green"), 1)}
    captions = result_file(tmp_path / "a.json", {i: t[0] for i, t in texts.items()})
    other = result_file(tmp_path / "b.json", dict.fromkeys(texts, "a house"))
    out, page = tmp_path / "scores.json", tmp_path / "page.html"
    done = run_script(
        "evaluate.py", captions, coco_file(tmp_path / "r.json", texts), "--images", tmp_path, photos, "--html", page,
        "--clip_model_type", clip_file, "--compare", other, "--out", out, *FAST,
    )  # fmt: skip
    result = json.loads(out.read_text())
    encoder = load_encoder(clip_file)
    unit = torch.nn.functional.normalize
    paths = [photos / f"COCO_val2014_{i:012d}.jpg" for i in texts]
    images = unit(next(encode_files(encoder, paths))[1].double())
    said = unit(encoder.encode_texts([f"A photo depicts a {w} circle" for w in ("red", "blue", "green")]).double())
    clip = 2.5 * (images * said).sum(1).clamp(min=0)
    both = 2 * clip / (clip + 1)  # the caption is one of its own references
    assert result["metrics"]["CLIPScore"] == pytest.approx(clip.mean().item(), rel=1e-6)
    assert result["metrics"]["RefCLIPScore"] == pytest.approx(both.mean().item(), rel=1e-6)
    assert result["per_image"][2]["CLIPScore"] == pytest.approx(clip[2].item(), rel=1e-6)
    assert "RefCLIPScore" in result["intervals"] and "CLIPScore" in result["comparison"]["differences"]
    assert re.search(r"\nCLIPScore +\d\.\d{3}  ", done.stdout) and "<td>RefCLIPScore</td>" in page.read_text()


def test_clip_scores_need_every_image(photos, clip_file, tmp_path):
    texts = {1: ["a dog"], 99: ["a cat"]}
    files = [
        result_file(tmp_path / "a.json", {i: t[0] for i, t in texts.items()}),
        coco_file(tmp_path / "r.json", texts),
    ]
    flags = ["--clip_model_type", str(clip_file), "--images", str(photos)]
    with pytest.raises(ValueError, match="lacks 1 of 2 images .image_id 99.; add"):
        evaluate.main([*files, *flags, *FAST])
    (tmp_path / "99.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="99.jpg: not a readable image"):
        evaluate.main([*files, *flags, str(tmp_path), *FAST])


def nocaps_file(path):
    """A nocaps json: ids of its own, hexadecimal file names, a domain per image."""
    domains = ("in-domain", "near-domain", "near-domain", "out-domain", "out-domain")
    images = [{"id": i, "file_name": f"00{i}ea2087020901.jpg", "domain": domain} for i, domain in enumerate(domains)]
    texts = ("a red dog runs", "a blue cat on a mat", "two birds fly over a lake", "the sea at night", "an old tree")
    annotations = [{"image_id": i, "caption": f"{text} {end}"} for i, text in enumerate(texts) for end in ("", "here")]
    return save(path, {"images": images, "annotations": annotations}), [image["file_name"][:-4] for image in images]


def test_nocaps(photos, tmp_path, capsys):
    """Captions by file name find their image, as does the page; each domain scores as a file of its own would."""
    references, names = nocaps_file(tmp_path / "nocaps_val.json")
    texts = ("a dog runs", "a cat", "two birds over a lake", "the sea", "a tree")
    captions = result_file(tmp_path / "a.json", dict(zip(names, texts, strict=True)))
    out, page = tmp_path / "scores.json", tmp_path / "page.html"
    for name, photo in zip(names, sorted(photos.glob("*.jpg")), strict=False):
        shutil.copy(photo, tmp_path / f"{name}.jpg")
    evaluate.main([captions, references, "--out", str(out), "--html", str(page), "--images", str(tmp_path), *FAST])
    result = json.loads(out.read_text())
    assert {name: part["images"] for name, part in result["domains"].items()} == {
        "in-domain": 1, "near-domain": 2, "out-domain": 2,
    }  # fmt: skip
    alone = result_file(tmp_path / "near.json", dict(list(zip(names, texts, strict=True))[1:3]))
    evaluate.main([alone, references, "--out", str(out), *FAST])
    assert result["domains"]["near-domain"]["metrics"] == json.loads(out.read_text())["metrics"]
    assert result["metrics"]["CIDEr"] != result["domains"]["near-domain"]["metrics"]["CIDEr"]
    printed = capsys.readouterr().out
    assert re.search(r"\nnear-domain +2 +\d", printed) and re.search(r"\noverall +5 +\d", printed)
    assert result["domains"]["in-domain"]["metrics"]["CIDEr"] is None  # its one image
    assert re.search(r"\nin-domain +1 .* –\n", printed) and "–: CIDEr is not defined on one image" in printed
    assert "<h2>Domains</h2>" in page.read_text() and page.read_text().count("data:image/jpeg") == 5


def test_empty_captions_are_said(tmp_path, capsys):
    """An image that could not be captioned counts as a bad one: said, for it is not the captioner's doing."""
    references = result_file(tmp_path / "refs.json", dict.fromkeys((1, 2, 3), "a dog runs."))
    captions = result_file(tmp_path / "own.json", {1: "", 2: "a dog runs.", 3: " "})
    evaluate.main([captions, references, *FAST])
    assert "warning: 2 of 3 captions are empty (image_id 1, 3)" in capsys.readouterr().err
