"""parse_coco.py --check: every bad record by place, file and reason, and nothing encoded."""

import json
import shutil

import pytest
from conftest import run_script

import encoders


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A function that checks annotations, given as text: ([[place, file, reason]], standard error)."""
    monkeypatch.setattr(encoders, "load_encoder", None)  # nothing may be encoded

    def checked(name, text, status, *more):
        (tmp_path / name).write_text(text)
        done = run_script(
            "parse_coco.py", "--check", "--annotations", tmp_path / name, "--images", tmp_path / "photos",
            "--num_workers", 0, "--out", tmp_path / "x.pkl", *more, check=status,
        )  # fmt: skip
        assert not (tmp_path / "x.pkl").exists() and not (tmp_path / "x.pkl.partial").exists()
        prefix = str(tmp_path / "photos") + "/"
        return [line.replace(prefix, "").split("\t") for line in done.stdout.splitlines()], done.stderr

    return checked


@pytest.fixture
def folder(photos, tmp_path):
    """A folder with three readable images, one broken, and one of another's name in a folder below."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number, name in enumerate(("1.jpg", "2.jpg", "dog.png", "more/2.jpg"), 1):
        shutil.copy(photos / f"COCO_val2014_{number:012d}.jpg", tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.jpg").write_bytes((tmp_path / "photos" / "1.jpg").read_bytes()[:200])
    return tmp_path / "photos"


def test_empty_captions_are_counted_before_and_after(folder, tmp_path, clip_file):
    """Nothing is encoded where all are empty; else those left out are told."""
    command = [
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", tmp_path / "c.csv", "--images", folder,
        "--num_workers", 0, "--out", tmp_path / "s.pkl",
    ]  # fmt: skip
    (tmp_path / "c.csv").write_text("image,caption\n1.jpg, \n2.jpg,\n")
    assert "all 2 captions are empty" in run_script(*command, check=2).stderr
    assert not list(tmp_path.glob("s.*"))
    (tmp_path / "c.csv").write_text("image,caption\n1.jpg,a dog\n2.jpg,\n")
    assert "2 images, 1 captions, 1 empty captions left out, 0 images skipped" in run_script(*command).stderr


def test_every_bad_record_is_named(check, folder):
    table = """image,caption,source
1.jpg,a dog,x
1.jpg, a dog ,x
none.jpg,a cat,x
dog.png,,x
broken.jpg,a tree,x
,a house,x
2.jpg,a house, red,x
2.jpg,"two
lines",x
more/2.jpg,a bird,x
broken.jpg,an old tree,x
"""
    faults, summary = check("captions.csv", table, 2)
    broken = [fault[2] for fault in faults if fault[1] == "broken.jpg"]
    assert len(broken) == 2 and all(reason.startswith("not a readable image") for reason in broken)
    assert [fault for fault in faults if fault[1] != "broken.jpg"] == [
        ["line 3", "1.jpg", "the same caption as line 2"],
        ["line 4", "none.jpg", "no such image"],
        ["line 5", "dog.png", "the caption is empty"],
        ["line 7", "-", "has image_id '', which is neither a number nor a name"],
        ["line 8", "-", "has not 3 fields like the header: quote the caption"],
    ]
    assert [fault[0] for fault in faults] == sorted((f[0] for f in faults), key=lambda place: int(place.split()[1]))
    assert summary.strip().endswith("captions.csv: 10 records of 5 images; 7 faults")
    assert "warning: 2 images share their name with another, such as 2.jpg" in summary


def test_other_formats(check, folder):
    records = [
        {"image_id": 1, "caption": "a"},
        {"caption": "a"},
        {"image_id": 9, "caption": None},
        "a",
        {"image_id": 7},
    ]
    places = ["record 2", "record 3", "record 4", "record 5"]
    for value in (records, {"annotations": records, "images": [{"id": 1, "file_name": "1.jpg"}]}):
        assert [fault[0] for fault in check("a.json", json.dumps(value), 2)[0]] == places
    images = [
        {"split": "train", "filename": "1.jpg", "sentences": [{"raw": "a"}]},
        {"split": "train", "filename": "2.jpg"},
        {"split": "test", "filename": "none.jpg", "sentences": [{"raw": "a"}]},
    ]
    faults, summary = check("a.json", json.dumps({"images": images}), 2)
    assert [fault[:2] for fault in faults] == [["image 2", "-"]] and "2 records of 1 images; 1 faults" in summary
    faults, _ = check("a.json", json.dumps({"images": images}), 2, "--split", "test")
    assert faults == [["image 3", "none.jpg", "no such image"]]
    faults, _ = check("a.jsonl", '{"image": "1.jpg", "caption": "a"}\n\n{"image": \n', 2)
    assert [fault[0] for fault in faults] == ["line 3"]


def test_good_data_and_files_that_cannot_be_read(check, folder):
    assert check("a.csv", "image,caption\n1.jpg,a dog\n1.jpg,a cat\n2.jpg,a dog\n", 0, "--num_workers", 2)[0] == []
    assert "needs image and caption" in check("a.csv", "file,text\n1.jpg,a\n", 2)[1]
    assert check("a.csv", 'image,caption\n1.jpg,"a\n', 2)[0][0][:2] == ["line 2", "-"]
