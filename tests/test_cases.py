"""Inputs that used to go wrong in silence, one command after another: each ends right, or in one clear line.

The inputs lie in `../shared/cases`, one folder for each kind, which is copied, for some commands write beside it.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field

import pytest
from conftest import ROOT, SAMPLES, SHARED, run_script

from features.images import ImageError, read_image

CHECK = "parse_coco.py --check --num_workers 0 --annotations "
PARSE = "parse_coco.py --clip_model_type {root}/demo/weights/clip.pt --num_workers 0 --annotations "
PREDICT = "predict.py --checkpoint demo "
NICE = "predict_nice.py --checkpoint demo --prompt= --stop_token . --decoder clipcap --beam_size 1 --ofile o --images "
SCORE = "evaluate.py --metrics Bleu CIDEr --tokenizer python --bootstrap 10 "
REFERENCES = [{"image_id": number, "caption": "A red ball."} for number in (1, 200001, 200003)]


@dataclass
class Step:
    """A command and what it must show.

    Args:
        command: words, `{c}` being the copied folder, `{t}` the folder beside it, in which it runs, `{root}` the
            repository's.
        status: exit status.
        shows: parts of what is printed.
        hides: what must not be.
        captions: how many lines `path<TAB>caption`; None: any.
    """

    command: str
    status: int = 0
    shows: tuple = ()
    hides: tuple = ()
    captions: int | None = None


@dataclass
class Case:
    """Commands on one folder of `../shared/cases`.

    Args:
        folder: its name, less the number; "" for one made by `make`.
        steps: in their order; or functions of (the copied folder, the folder beside it).
        make: likewise a function, which fills the folder first.
        check: likewise, which looks at what has been written.
    """

    folder: str
    steps: list = field(default_factory=list)
    make: object = None
    check: object = None


def check(names, status=0, *shows, images="{c}", hides=()):
    """Return the Step of looking over an annotation file."""
    return Step(f"{CHECK} {names} --images {images}", status, shows, hides)


def copy_demo(folder, name, number=200001):
    shutil.copy(ROOT / "demo" / "images" / f"{number}.jpg", os.path.join(os.fsencode(folder), os.fsencode(name)))


def add_picture(folder, _beside):
    copy_demo(folder, "new.jpg")


def make_latin_name(folder, _beside):
    copy_demo(folder, b"caf\xe9.jpg")
    copy_demo(folder, "plain.jpg", 200003)


def make_loop(folder, _beside):
    copy_demo(folder, "a.jpg")
    os.symlink("b.jpg", folder / "b.jpg")


def make_demo(folder, beside):
    for picture in SAMPLES:
        shutil.copy(picture, folder)
    (beside / "out").mkdir()


def make_tar(folder, beside):
    with tarfile.open(beside / "00000.tar", "w") as tar:
        for file in sorted((folder / "00000").iterdir()):
            tar.add(file, file.name)


def unchanged(folder, _beside):
    """What the user has written is still there, and nothing beside it."""
    assert json.loads((folder / "my.json").read_text()) == json.loads((original("overwrite") / "my.json").read_text())
    assert sorted(os.listdir(folder)) == sorted(os.listdir(original("overwrite")))


def nice_rows(*ids):
    """Return a check that output_caption/o.csv and .json have rows of just these ids, all with captions."""

    def checked(_folder, beside):
        rows = (beside / "output_caption" / "o.csv").read_text(encoding="utf-8").splitlines()
        assert [row.split(",")[0] for row in rows] == ["public_id", *ids] and all(row.split(",")[1] for row in rows)
        assert list(json.loads((beside / "output_caption" / "o.json").read_text(encoding="utf-8"))) == list(ids)

    return checked


def shared_are_told_apart(folder, beside):
    results = json.loads((beside / "c.json").read_text(encoding="utf-8"))
    names = {r["file_name"] for r in results if r["image_id"] == 1}
    assert names == {str(folder / name) for name in ("01.jpg", "1.jpg", "1.png")}
    assert {r["image_id"] for r in results} == {1, 2, "２"}


def holds_the_second_picture(folder, beside):
    embeddings = []
    for name in ("s.pkl", "fresh.pkl"):
        embeddings.append(pickle.loads((beside / name).read_bytes())["clip_embedding"].float())
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-3


def both_names(_folder, beside):
    results = json.loads((beside / "c.json").read_text(encoding="utf-8"))
    assert {r["image_id"] for r in results} == {"caf\\xe9", "plain"} and all(r["caption"] for r in results)


def is_a_table(_folder, beside):
    assert (beside / "c.csv").read_text(encoding="utf-8").startswith("image_id,caption\n")


MISSING = "no such image"
OVER = "would overwrite the annotations"
CASES = {
    "a store's json over the annotations": Case("overwrite", [
        Step(PARSE + "{c}/my.json --images {c} --out {c}/my.pkl", 2, (OVER, "my.json")),
        Step(PARSE + "{c}/my.json --images {c} --out {c}/my/", 2, (OVER, "my.json")),
        Step(SCORE + "{c}/my.json {t}/refs.json --out {c}/my.json", 2, ("would overwrite the captions",)),
    ], check=unchanged),
    "one name in two folders": Case("same_name_two_folders", [
        check("{c}/captions.csv", 0, "3 records of 3 images; 0 faults", images="{c}/photos/cats {c}/photos/dogs"),
        check("{c}/missing/captions.csv", 2, f"birds/1.jpg\t{MISSING}", images="{c}/missing"),
    ]),
    "full stops in names": Case("dots", [
        Step(NICE + "{c}"), add_picture, Step(NICE + "{c}", 0, ("3 of 4 images are captioned",)),
    ], check=nice_rows("Screenshot 2026-01-02 at 10.15.30", "new", "v1.2", "v1.3")),
    "pictures that share an id, in the challenge's file": Case("same_base", [
        Step(NICE + "{c}", 2, ("share a public_id", "1.jpg", "1.png", "01.jpg")),
    ]),
    "pictures that share an id": Case("same_base", [
        Step(PREDICT + "{c} --out {t}/c.json", 0, ("warning: 3 images share an image_id",), captions=5),
        Step(SCORE + "{t}/c.json {t}/refs.json --subset", 2, ("several captions for 1 images", "image_id 1")),
    ], check=shared_are_told_apart),
    "leading zeros": Case("same_base", [
        Step(SCORE + "{c}/captions_leading_zeros.json {c}/references_leading_zeros.json", 0, ("1 of 2 images",)),
    ]),
    "other pictures of the same names": Case("stale", [
        Step(PARSE + "{c}/c.csv --out {t}/s.pkl --images {c}/v1"),
        Step(PARSE + "{c}/c.csv --out {t}/s.pkl --images {c}/v2", 0, ("1 images, 1 captions",), ("nothing to do",)),
        Step(PARSE + "{c}/c.csv --out {t}/fresh.pkl --images {c}/v2"),
    ], check=holds_the_second_picture),
    "quotes between tabs": Case("tsv_quotes", [
        check("{c}/merged.tsv", 0, "4 records of 4 images; 0 faults"),
        check("{c}/captions.tsv", 0, "2 records of 2 images; 0 faults"),
    ]),
    "a name that is not UTF-8": Case("", [
        Step(PREDICT + "{c} --out {t}/c.json", captions=2),
    ], make_latin_name, both_names),
    "a name that is not UTF-8, in the challenge's file": Case("", [
        Step(NICE + "{c}"),
    ], make_latin_name, nice_rows("caf\\xe9", "plain")),
    "line separators in JSON lines": Case("jsonl_separator", [check("{c}/captions.jsonl", 0, "2 records of 2 images")]),
    "ids beyond 64 bits": Case("large_ids", [
        Step(PARSE + "{c}/captions.csv --images {c} --out {t}/d/", 0, ("2 images, 2 captions, 0 images skipped",)),
    ]),
    "other endings": Case("endings", [
        Step(PREDICT + "{c}", 2, ("HEIC", "notes.txt", "1 of 6 images could not be read"), captions=5),
    ]),
    "other files under a picture's name": Case("heic_as_jpg", [
        Step(PREDICT + "{c}", 2, ("HEIC: convert it, or pip install pillow-heif", "an HTML page", "an empty file",
                                  "a drawing (SVG)", "4 of 4 images could not be read"),
             ("are captioned",), captions=0),
    ]),
    "macOS's files": Case("appledouble", [
        Step(PREDICT + "{c}", 0, hides=("._beach",), captions=2), Step(NICE + "{c}"),
    ], check=nice_rows("beach", "garden")),
    "long metadata": Case("png_text", [Step(PREDICT + "{c}", captions=2)]),
    "broken EXIF": Case("bad_exif", [Step(PREDICT + "{c}/bad_exif.png", captions=1)]),
    "108 megapixels": Case("100_megapixels", [Step(PREDICT + "{c}", captions=1)]),
    "another Unicode form": Case("nfd", [check("{c}/captions.csv", 0, "0 faults", images="{c}/photos")]),
    "Windows' paths and letter case": Case("backslash", [
        check("{c}/captions.csv", 0, "0 faults", images="{c}/photos"),
        check("{c}/coco.json", 0, "0 faults", images="{c}/photos"),
        check("{c}/case/captions.csv", 0, "0 faults", images="{c}/case"),
    ]),
    "too long a name": Case("long_name", [
        check("{c}/captions.csv", 2, "line 3\t", "line 4\t", MISSING, hides=("too long",)),
    ]),
    "image folders": Case("imagefolder", [
        check(f"{{c}}/{name}", 0, "2 records of 2 images; 0 faults")
        for name in ("metadata.jsonl", "metadata.csv", "metadata_caption.csv")
    ]),
    "lists of captions": Case("caption_lists", [
        Step(f"{SCORE} {{c}}/captions.json {{c}}/{name}", 0, ("2 images",))
        for name in ("karpathy_val.json", "gts.json")
    ]),
    "Flickr8k": Case("flickr8k", [
        check("{c}/captions.txt", 0, "0 faults"), check("{c}/Flickr8k.token.txt", 0, "3 records of 2 images; 0 faults"),
        check("{c}/results.csv", 0, "2 records of 2 images; 0 faults"),
    ]),
    "tables as spreadsheets write them": Case("excel_csv", [
        check("{c}/latin1.csv", 2, "line 32\t", "0xe9", "UTF-8"), check("{c}/utf16.csv", 0, "0 faults"),
        check("{c}/semicolon.csv", 2, 'the delimiter ";"'), check("{c}/spaces.csv", 0, "2 records of 2 images"),
        check("{c}/capitals.csv", 0, "1 records of 1 images; 0 faults"),
        check("{c}/quote.csv", 2, "line 2\t", "stray quote", "c.jpg\tno such image", hides=("line 3",)),
        check("{c}/floats.csv", 2, "line 2\t", "line 3\t", "decimal"), check("{c}/lines.json", 0, "0 faults"),
    ]),
    "CIDEr of one image": Case("cider_one", [
        Step(SCORE + "{c}/captions.json {c}/references.json", 0, ("CIDEr   not defined on one image",), ("0.000",)),
    ]),
    "captions without blanks": Case("chinese", [
        Step(SCORE + "{c}/captions.json {c}/references.json", 0, ("warning: ", "words")),
    ]),
    "a folder for a file": Case("", [
        Step(PREDICT + "{c} --out {t}/out", 0, ("out/: 1 files, 10 captions",), captions=0),
    ], make_demo),
    "img2dataset's tar": Case("img2dataset", [
        Step(PREDICT + "{t}/00000.tar", captions=1),
        Step(PREDICT + "{t}/00000.tar --out {t}/out/", 0, ("out/: 1 files, 1 captions",), captions=0),
        Step(PARSE.replace("--annotations", "--images {t}/00000.tar --out {t}/s/"), 0, ("1 images, 1 captions",)),
    ], make_tar),
    "captions as a table": Case("", [
        Step(PREDICT + "{c} --out {t}/c.csv", captions=10),
        Step(SCORE + "{t}/c.csv {t}/refs.json --subset", 0, ("2 images",)),
    ], make_demo, is_a_table),
    "a folder of folders": Case("img2dataset", [
        Step(PREDICT + "{c}", 2, ("holds no images, but 1 folder", 'quote a glob: "', "**/*.jpg"), captions=0),
    ]),
    "what is no annotation": Case("other_annotations", [
        check("{c}/image_info_test2017.json", 2, "has images but no captions", images="{c}/side"),
        check("{c}/empty_annotations.json", 2, "has images but no captions", images="{c}/side"),
        check("{c}/00000.parquet", 2, "Parquet: ", images="{c}/side"),
        check("{c}/side", 2, "is a folder", images="{c}/side"),
    ]),
    "a link to itself": Case("", [
        Step(PREDICT + "{c}", 2, ("b.jpg: cannot be opened: too many levels of symbolic links",), captions=1),
    ], make_loop),
}  # fmt: skip


def original(name):
    """Return a folder of inputs by its name, less its number; a skip where there is none."""
    folders = list((SHARED / "cases").glob(f"[0-9][0-9]_{name}"))
    if not folders:
        pytest.skip(f"the inputs are not at {SHARED / 'cases'}/*_{name}")
    return folders[0]


def run_step(step, folder, beside):
    words = [word.format(c=folder, t=beside, root=ROOT) for word in step.command.split()]
    done = run_script(*words, check=step.status)
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert all(part in text for part in step.shows), text
    assert not any(part in text for part in step.hides), text
    assert step.captions in (None, sum(line.count("\t") for line in done.stdout.splitlines())), text


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path, monkeypatch):
    case = CASES[name]
    folder = tmp_path / "case"
    if case.folder:
        shutil.copytree(original(case.folder), folder)
    else:
        folder.mkdir()
    if case.make:
        case.make(folder, tmp_path)
    (tmp_path / "refs.json").write_text(json.dumps(REFERENCES))
    monkeypatch.chdir(tmp_path)
    for step in case.steps:
        step(folder, tmp_path) if callable(step) else run_step(step, folder, tmp_path)
    if case.check:
        case.check(folder, tmp_path)


RUNS = {  # runs of several processes, by the folder's own script: what they must print, and what they must not
    "two_at_once": (("another run is writing", "exit 2", "rows: 600  of another picture: 0"), ("IndexError", "exit 1")),
    "resume": (("nothing to do", "--init_from", "the json of --data's store"), ("moved to",)),
    "worker_killed": (("exit 2", "was killed", "images are captioned"), ("exit 0",)),
    "sigterm": (("exit 143", "captions.json", "terminated: "), ("No such file",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_several_processes(name):
    shows, hides = RUNS[name]
    command = ["bash", original(name) / "run.sh", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    text = done.stdout + done.stderr
    assert all(part in text for part in shows), text
    assert not any(part in text for part in ("Traceback", *hides)), text


def test_bands_are_no_pages():
    with pytest.raises(ImageError, match="8 bands"):
        read_image(original("many_bands") / "bands8.tif")
