"""Which file an annotation means: just that one, or none and the reason why."""

import os
import pickle
import unicodedata

import pytest
from conftest import run_script
from PIL import Image

from features.finder import ImageFinder, match_images


@pytest.fixture
def tree(tmp_path):
    """A function that makes files of the given paths and returns ({name: path or reason} of names, ImageFinder)."""

    def find(files, names, *folders, annotations=None):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        finder = ImageFinder([tmp_path / folder for folder in folders], annotations)
        records = [{"image_id": number, "file_name": name} for number, name in enumerate(names, 1000)]
        found = finder.find_all(records)
        return [str(path.relative_to(tmp_path)) if path else reason for path, reason in found]

    return find


MISSING = "no such image"
FOUND = {  # (files, names, folders): what is found
    "two folders": (["p/cats/1.jpg", "p/dogs/1.jpg"], ["cats/1.jpg", "dogs/1.jpg"], ["p/cats", "p/dogs"],
                    ["p/cats/1.jpg", "p/dogs/1.jpg"]),
    "their order": (["a/1.jpg", "b/1.jpg"], ["1.jpg"], ["b", "a"], ["b/1.jpg"]),
    "below": (["p/cats/1.jpg", "p/1.jpg"], ["cats/1.jpg", "1.jpg"], ["p"], ["p/cats/1.jpg", "p/1.jpg"]),
    "no number": (["p/0001.png", "p/dogs/2.jpg"], ["birds/1.jpg", "1.jpg"], ["p"], [MISSING] * 2),
    "folder above": (["x/val2014/1.jpg"], ["val2014/1.jpg"], ["x/val2014"], ["x/val2014/1.jpg"]),
    "renamed": (["x/y/1.jpg", "x/y/2.jpg"], ["train2014/1.jpg", "val2014/2.jpg"], ["x/y"], ["x/y/1.jpg", "x/y/2.jpg"]),
    "two would be one": (["x/y/1.jpg"], ["a/1.jpg", "b/1.jpg"], ["x/y"], ["a/1.jpg and b/1.jpg would both be"] * 2),
    "folder beside": (["p/cats/5.jpg", "p/dogs/2.jpg"], ["dogs/5.jpg"], ["p/cats"], [MISSING]),
    "folder given": (["p/cats/5.jpg", "q/dogs/2.jpg"], ["dogs/5.jpg"], ["p/cats", "q/dogs"], [MISSING]),
    "folder below": (["p/5.jpg", "p/dogs/2.jpg"], ["dogs/5.jpg", "Dogs/5.jpg"], ["p"], [MISSING] * 2),
    "as the others": (["p/cats/1.jpg", "p/cats/5.jpg"], ["cats/1.jpg", "birds/5.jpg"], ["p/cats"],
                      ["p/cats/1.jpg", MISSING]),
    "root of others": (["p/1.jpg", "p/dogs/2.jpg"], ["dogs/2.jpg", "birds/1.jpg"], ["p"], ["p/dogs/2.jpg", MISSING]),
    "not of a subfolder": (["p/cats/5.jpg"], ["5.jpg", "birds/5.jpg", "train/cats/5.jpg"], ["p"],
                           [MISSING, MISSING, "p/cats/5.jpg"]),
    "two renamed": (["a/1.jpg", "b/1.jpg"], ["x/1.jpg"], ["a", "b"], ["may be"]),
    "Windows": (["p/sub/a.jpg", "p/sub/b.jpg"], ["C:\\data\\sub\\a.jpg", "sub\\b.jpg"], ["p"],
                ["p/sub/a.jpg", "p/sub/b.jpg"]),
    "other machine": (["p/a.jpg"], ["/home/somebody/photos/a.jpg"], ["p"], ["p/a.jpg"]),
    "letter case": (["p/Sub/a.jpg"], ["SUB/A.JPG"], ["p"], ["p/Sub/a.jpg"]),
    "case of a folder above": (["p/Cats/1.jpg", "p/Dogs/1.jpg"], ["dogs/1.jpg"], ["p/Cats", "p/Dogs"],
                               ["p/Dogs/1.jpg"]),
    "case told apart": (["p/a.jpg", "p/A.jpg"], ["a.jpg", "A.jpg", "A.JPG"], ["p"], ["p/a.jpg", "p/A.jpg", "may be"]),
    "case is no licence": (["p/a.jpg"], ["a.jpg", "A.jpg"], ["p"], ["p/a.jpg", "A.jpg and a.jpg would both be"]),
    "not a path": (["p/a.jpg"], ["a\0.jpg", "x" * 300 + ".jpg", "https://a.example/" + "x" * 5000, "/", ".", "sub/"],
                   ["p"], [MISSING] * 6),
    "out of the folders": (["p/a.jpg", "q/b.jpg"], ["../q/b.jpg", "sub/../a.jpg", "../p/a.jpg"], ["p"],
                           [MISSING, "p/a.jpg", "p/a.jpg"]),
    "any ending": (["p/a.jpg_large", "p/b"], ["a.jpg_large", "b"], ["p"], ["p/a.jpg_large", "p/b"]),
    "no ending": (["p/a.jpg", "p/0007.png"], ["a", "7", "8"], ["p"], ["p/a.jpg", "p/0007.png", MISSING]),
    "a folder": (["p/a.jpg/b.jpg"], ["a.jpg"], ["p"], [MISSING]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_names(tree, case):
    files, names, folders, expected = FOUND[case]
    found = tree(files, names, *folders)
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert got == wanted or (wanted not in (MISSING, "") and wanted in got), found


def test_unicode_forms(tree):
    composed, apart = (unicodedata.normalize(form, "café/é.jpg") for form in ("NFC", "NFD"))
    assert tree([f"p/{apart}"], [composed], "p") == [f"p/{apart}"]
    assert tree([f"q/{composed}"], [apart], "q") == [f"q/{composed}"]


def test_names_beside_the_annotations(tree, tmp_path):
    files = ["p/1.jpg", "own/2.jpg", "own/sub/3.jpg"]
    found = tree(files, ["1.jpg", "2.jpg", "sub/3.jpg", "x/2.jpg"], "p", annotations=tmp_path / "own" / "c.csv")
    assert found == ["p/1.jpg", "own/2.jpg", "own/sub/3.jpg", MISSING]


def test_absolute_names_and_links(tree, tmp_path):
    assert tree(["q/a.jpg"], [str(tmp_path / "q/a.jpg")], "q") == ["q/a.jpg"]
    for root in ("/host", "file://", "C:"):  # where the folder lies below another root
        assert tree(["q/a.jpg"], [f"{root}{tmp_path / 'q/a.jpg'}"], "q") == ["q/a.jpg"]
    os.symlink("b.jpg", tmp_path / "q" / "b.jpg")
    os.symlink("gone.jpg", tmp_path / "q" / "c.jpg")
    os.symlink("a.jpg", tmp_path / "q" / "d.jpg")
    leads = "a link that leads nowhere"
    assert tree([], ["b.jpg", "c.jpg", "d.jpg"], "q") == [leads, leads, "q/d.jpg"]
    (tmp_path / "q" / "b.jpg").unlink()
    os.symlink("q", tmp_path / "again")
    found = ImageFinder([tmp_path / "q", tmp_path / "again"]).find_all([{"image_id": "d"}, {"image_id": "a"}])
    assert [reason for _, reason in found] == [None, None]  # one folder under two names


def test_numbers(tree, tmp_path):
    tree(["p/0001.png", "p/dog.jpg", "p/v1.3.jpg", "q/1.jpg", "q/2.jpg", "q/2.png"], [], "p")
    one, both = ImageFinder([tmp_path / "p"]), ImageFinder([tmp_path / "p", tmp_path / "q"])
    wanted = {1: "0001.png", "01": "0001.png", "dog": "dog.jpg", "v1.3": "v1.3.jpg", "dog.jpg": "dog.jpg"}
    for image_id, name in wanted.items():
        assert one.find({"image_id": image_id}) == tmp_path / "p" / name
    assert one.find({"image_id": 7}) is None and one.find({"image_id": "v1"}) is None
    [(path, reason)] = both.find_all([{"image_id": 1}])
    assert path is None and "0001.png" in reason and "q/1.jpg" in reason
    [(path, reason)] = both.find_all([{"image_id": 2}])
    assert path is None and "2.jpg" in reason and "2.png" in reason
    assert all("would all be" in reason for _, reason in one.find_all([{"image_id": "1"}, {"image_id": "001"}]))


def test_two_images_of_one_id(tree, tmp_path):
    tree(["p/a.jpg", "p/b.jpg"], [], "p")
    records = [{"image_id": 5, "file_name": name} for name in ("a.jpg", "b.jpg", "a.jpg")]
    reasons = [reason for _, reason in match_images(records, ImageFinder([tmp_path / "p"]))]
    assert reasons[0] is reasons[2] is None and "image_id 5 is that of" in reasons[1]


def test_folders_that_are_none(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match="a.jpg is a file"):
        ImageFinder([tmp_path / "a.jpg"])


def test_the_store_holds_each_names_own_picture(tmp_path, clip_file):
    """The pixels behind cats/1.jpg and dogs/1.jpg differ, and so do their rows; a bad row stops no other."""
    for number, name in enumerate(("cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), ("red", "green", "blue")[number]).save(path)
    table = 'image,caption\ncats/1.jpg,red\ndogs/1.jpg,green\nx.jpg,"a" b\ndogs/2.jpg,blue\nbirds/2.jpg,none\n'
    (tmp_path / "c.csv").write_text(table)
    command = [
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", tmp_path / "c.csv", "--num_workers", 0,
        "--images", tmp_path / "cats", tmp_path / "dogs", "--out", tmp_path / "s.pkl",
    ]  # fmt: skip
    done = run_script(*command)
    assert "skipped line 4: has a stray quote" in done.stderr and "skipped birds/2.jpg: no such image" in done.stderr
    captions = pickle.loads((tmp_path / "s.pkl").read_bytes())["captions"]
    assert [(c["image_id"], c["caption"], c["clip_embedding"]) for c in captions] == [
        ("cats/1.jpg", "red", 0), ("dogs/1.jpg", "green", 1), ("dogs/2.jpg", "blue", 2),
    ]  # fmt: skip
    assert "line 4" in run_script(*command, "--strict", check=2).stderr
