"""predict.py and predict_nice.py: which caption is whose, and what stands in the files however a run ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_outputs import alias
from test_scripts import one_line_error

import predict as predict_script
import predict_nice
from models import captioning
from models.captioner import Captioner
from utils.outputs import lock
from utils.precision import PackedLinear, QuantizedLinear


@pytest.fixture
def checkpoint(trained):
    return trained / "run_latest.pt"


def pictures(folder, *names):
    """Write a small picture under each name; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (40, 40), "red").save(folder / "picture.png")
        os.rename(folder / "picture.png", os.path.join(os.fsencode(folder), os.fsencode(name)))
    return folder


def predict(*words, check=0):
    return run_script("predict.py", *words, check=check)


# ---- which caption is whose


def test_pictures_that_share_an_id_are_named_first(checkpoint, tmp_path):
    """Each result also says which file it is of; the evaluation goes on refusing such a file."""
    folder, out = pictures(tmp_path / "p", "1.jpg", "1.png", "01.jpg", "2.jpg"), tmp_path / "c.json"
    done = predict(folder, "--checkpoint", checkpoint, "--out", out)
    warning = done.stderr.splitlines()[0]
    assert warning.startswith("warning: 3 images share an image_id with another (1: ") and "01.jpg" in warning
    results = json.loads(out.read_text())
    assert sorted(r["file_name"] for r in results if r["image_id"] == 1) == [
        str(folder / name) for name in ("01.jpg", "1.jpg", "1.png")
    ]
    assert [r for r in results if "file_name" not in r] == [results[3]] and results[3]["image_id"] == 2
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps([{"image_id": i, "caption": "a red square."} for i in (1, 2)]))
    for more in ([], ["--subset"]):
        one_line_error(run_script("evaluate.py", out, refs, *more, check=2), "captions for 1 images (image_id 1)")
    assert "share" not in predict(folder, "--checkpoint", checkpoint).stderr


def test_names_that_are_not_utf8(checkpoint, tmp_path):
    folder = pictures(tmp_path / "p", b"caf\xe9.jpg", "plain.jpg", "two\nlines\t.jpg")
    done = predict(folder, "--checkpoint", checkpoint, "--out", tmp_path / "c.json")
    assert [line.split("\t")[0].rsplit("/", 1)[1] for line in done.stdout.splitlines()] == [
        "caf\\xe9.jpg", "plain.jpg", "two\\nlines\\t.jpg",
    ]  # fmt: skip
    ids = [r["image_id"] for r in json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))]
    assert ids == ["caf\\xe9", "plain", "two\nlines"]


def test_others_are_captioned_only_where_there_are_others(checkpoint, tmp_path):
    folder = pictures(tmp_path / "p", "good.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    done = predict(folder, "--checkpoint", checkpoint, check=2)
    assert done.stdout.count("\t") == 1 and "too many levels" in done.stderr
    one_line_error(done, "1 of 2 images could not be read; the others are captioned")
    done = predict(folder / "loop.jpg", "--checkpoint", checkpoint, check=2)
    one_line_error(done, "1 of 1 images could not be read")
    assert done.stderr.splitlines()[-1].endswith("could not be read")


def test_max_pixels(checkpoint, tmp_path):
    folder = pictures(tmp_path / "p", "a.jpg")
    one_line_error(predict(folder, "--checkpoint", checkpoint, "--max_pixels", 1000, check=2), "1 of 1")
    assert predict(folder, "--checkpoint", checkpoint, "--max_pixels", 1600).stdout


def test_one_caption_waits_for_no_layout(checkpoint, photos, monkeypatch, capsys):
    """Laying weights out takes longer than it saves where one row is decoded; 8 bits are always made."""
    counted = []

    def count(args, **options):
        captioner = captioner_of(args, **options)
        layers = list(captioner.model.gpt.modules())
        counted.append([any(isinstance(layer, kind) for layer in layers) for kind in (PackedLinear, QuantizedLinear)])
        return captioner

    captioner_of = captioning.captioner_of
    monkeypatch.setattr(captioning, "captioner_of", count)
    one, two = [sorted(map(str, photos.glob("*.jpg")))[:number] for number in (1, 2)]
    packed = torch.backends.mkldnn.is_available()
    for words, expected in (
        (one, [False, False]), (two, [packed, False]), ([*one, "--dtype", "int8"], [False, True]),
        ([*one, "--use_beam_search"], [packed, False]), ([*one, "--rerank", "mbr"], [packed, False]),
        ([*one, "--rerank", "mbr", "--num_candidates", "1"], [False, False]),
        ([*one, "--use_beam_search", "--rerank", "mbr", "--num_candidates", "1"], [packed, False]),
        ([*one, "--top_p", "0.9"], [False, False]), ([*one, "--top_p", "0.9", "--num_captions", "2"], [packed, False]),
    ):  # fmt: skip
        counted.clear()
        assert not predict_script.main([*words, "--checkpoint", str(checkpoint), "--device", "cpu"])
        assert counted == [expected], words
    capsys.readouterr()
    predict_script.main([one[0], "--checkpoint", str(checkpoint), "--device", "cpu"])
    alone = capsys.readouterr().out
    predict_script.main([*two, "--checkpoint", str(checkpoint), "--device", "cpu"])
    assert alone == capsys.readouterr().out.splitlines(keepends=True)[0]


# ---- outputs


def test_outputs_are_checked_before_anything_is_loaded(checkpoint, clip_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    folder = pictures(tmp_path / "p", "a.jpg", "noending")
    for out, said in (
        (folder / "a.jpg" / "c.json", "is no folder"),
        (folder / "a.jpg", "must end in .json or .csv"),
        (tmp_path / "c.jsonl", "must end in .json or .csv"),
        (folder / "noending", "would overwrite one of the images"),
        (checkpoint.with_name("run.json"), "would overwrite the captioner"),
    ):
        before = {path: path.read_bytes() for path in (folder / "a.jpg", checkpoint.with_name("run.json"))}
        done = predict(folder, "--checkpoint", checkpoint, "--out", out, check=2)
        one_line_error(done, said)
        assert before == {path: path.read_bytes() for path in before}
    with lock(tmp_path / "c.json"):
        one_line_error(
            predict(folder, "--checkpoint", checkpoint, "--out", tmp_path / "c.json", check=2), "another run"
        )


def test_csv_is_written_and_read_back(checkpoint, tmp_path):
    folder, out = pictures(tmp_path / "p", "1.jpg", 'a "b", c.jpg'), tmp_path / "c.CSV"
    texts = [
        line.split("\t")[1] for line in predict(folder, "--checkpoint", checkpoint, "--out", out).stdout.splitlines()
    ]
    assert out.read_text().startswith("image_id,caption\n1,")
    os.rename(out, tmp_path / "c.csv")
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps([{"image_id": i, "caption": t} for i, t in zip((1, 'a "b", c'), texts, strict=True)]))
    scores = run_script("evaluate.py", tmp_path / "c.csv", refs, "--metrics", "Bleu", "--out", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 2, scores.stderr


def test_a_table_loses_no_caption(checkpoint, tmp_path):
    """Several captions of an image are for JSON; pictures that share an id are told apart by their file names."""
    folder, out = pictures(tmp_path / "p", "1.jpg", "1.png", "2.jpg"), tmp_path / "c.csv"
    words = (folder, "--checkpoint", checkpoint, "--out", out)
    one_line_error(predict(*words, "--top_p", 0.9, "--num_captions", 2, check=2), "--num_captions 2")
    assert not out.exists()
    predict(*words)
    rows = [line.split(",") for line in out.read_text().splitlines()]
    assert rows[0] == ["image_id", "caption", "file_name"]
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("1", str(folder / "1.jpg")), ("1", str(folder / "1.png")), ("2", ""),
    ]  # fmt: skip
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps([{"image_id": i, "caption": "a red square."} for i in (1, 2)]))
    one_line_error(run_script("evaluate.py", out, refs, check=2), "several captions for 1 images (image_id 1)")


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError("from the driver"), ChildProcessError("killed")))
@pytest.mark.parametrize("ending", (".json", ".csv"))
def test_what_is_done_is_kept(checkpoint, photos, tmp_path, monkeypatch, error, ending):
    plain = Captioner.caption_files

    def cut_short(self, *words):
        yield from [batch for batch, _ in zip(plain(self, *words), range(2), strict=False)]
        raise error

    monkeypatch.setattr(Captioner, "caption_files", cut_short)
    out = tmp_path / f"c{ending}"
    words = (photos, "--checkpoint", checkpoint, "--out", out, "--batch_size", 2)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            predict(*words)
    else:
        done = predict(*words, check=130 if error is KeyboardInterrupt else 2)
        assert "4 of 12 images are captioned" in done.stderr
    assert len(out.read_text().splitlines()) == 5 if ending == ".csv" else len(json.loads(out.read_text())) == 4


def stop_after_two_batches(monkeypatch, number):
    """Send the command a signal when two batches are captioned; None: an error stops it."""
    plain = Captioner.caption_files

    def stopping(self, *words):
        for count, batch in enumerate(plain(self, *words)):
            if count == 2 and number is None:
                raise ChildProcessError("killed")
            if count == 2:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(Captioner, "caption_files", stopping)


SIGNALS = pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))


@SIGNALS
def test_signals(checkpoint, photos, tmp_path, number):
    words = (photos, "--checkpoint", checkpoint, "--out", tmp_path / "c.json", "--batch_size", 2)
    with pytest.MonkeyPatch.context() as patch:
        stop_after_two_batches(patch, number)
        done = predict(*words, check=128 + number)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert done.stderr.splitlines()[-1] == f"{word}: 4 of 12 images are captioned, in {tmp_path / 'c.json'}"
    kept = json.loads((tmp_path / "c.json").read_text())
    assert len(kept) == 4 and os.listdir(tmp_path) == ["c.json"]
    predict(*words)
    assert json.loads((tmp_path / "c.json").read_text())[:4] == kept


@pytest.mark.parametrize("ending", (".json", ".csv"))
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, None))
def test_a_stopped_run_leaves_an_earlier_result(checkpoint, photos, tmp_path, number, ending):
    """What is done stands beside it, each time under a name of its own; a run that ends well takes its place."""
    out, words = tmp_path / f"c{ending}", (photos, "--checkpoint", checkpoint, "--batch_size", 2)
    predict(*words, "--out", out)
    whole = out.read_bytes()
    for name in ("c.partial", "c.partial2"):
        with pytest.MonkeyPatch.context() as patch:
            stop_after_two_batches(patch, number)
            done = predict(*words, "--out", out, check=128 + number if number else 2)
        part = tmp_path / (name + ending)
        said = f"4 of 12 images are captioned, in {part}; {out} stays as it was"
        assert any(line.endswith(said) for line in done.stderr.splitlines()), done.stderr
        assert whole == out.read_bytes() and whole.startswith(part.read_bytes().rstrip(b"\n]"))
    predict(photos / "COCO_val2014_000000000001.jpg", "--checkpoint", checkpoint, "--out", out)
    assert len(os.listdir(tmp_path)) == 3 and len(out.read_bytes()) < len(part.read_bytes())


@SIGNALS
def test_nice_goes_on_after_signals(nice, photos, tmp_path, number):
    nice(photos)
    whole = (tmp_path / "out" / "d.csv").read_text()
    shutil.rmtree(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_after_two_batches(patch, number)
        done = nice(photos, "--batch_size", 2, check=128 + number)
    assert done.stderr.splitlines()[-1].endswith("the same command goes on from here")
    assert rows(tmp_path) == ["1", "2", "3", "4"]
    assert "4 of 12 images are captioned" in nice(photos).stderr
    assert (tmp_path / "out" / "d.csv").read_text() == whole and len(os.listdir(tmp_path / "out")) == 3


@pytest.mark.parametrize("how", ("plain", "relative", "link"))
def test_nice_second_run(nice, photos, tmp_path, monkeypatch, how):
    (tmp_path / "x" / "out").mkdir(parents=True)
    monkeypatch.setattr(predict_nice, "FOLDER", Path(alias(tmp_path / "x" / "out", how, monkeypatch)))
    with lock(tmp_path / "x" / "out" / "d.json"):
        one_line_error(nice(photos, check=2), "another run is writing", "another --ofile")
    assert os.listdir(tmp_path / "x" / "out") == []


def test_outputs_that_belong_to_something_else(checkpoint, photos, tmp_path):
    """The json of another run or of a store, or by a link the checkpoint's own."""
    shutil.copy(checkpoint.with_name("run.json"), tmp_path / "other.json")
    (tmp_path / "link.json").symlink_to(checkpoint.with_name("run.json"))
    before = (tmp_path / "other.json").read_bytes()
    for name, said in (("other.json", "the json of a training run"), ("link.json", "would overwrite the captioner")):
        one_line_error(predict(photos, "--checkpoint", checkpoint, "--out", tmp_path / name, check=2), said)
    assert before == (tmp_path / "other.json").read_bytes() == checkpoint.with_name("run.json").read_bytes()


@pytest.mark.slow
def test_an_output_that_cannot_show_a_name(checkpoint, tmp_path):
    """A terminal without UTF-8 gets escapes, and the file is whole."""
    folder = pictures(tmp_path / "p", "café.jpg", b"caf\xe9.jpg")
    done = subprocess.run(
        [sys.executable, "predict.py", folder, "--checkpoint", checkpoint, "--out", tmp_path / "c.json"],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii:backslashreplace"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.isascii() and done.stdout.count("\t") == 2, done.stderr
    assert len(json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))) == 2


# ---- predict_nice.py


@pytest.fixture
def nice(checkpoint, tmp_path, monkeypatch):
    """A function that runs predict_nice.py on a folder; its files are under out/."""
    monkeypatch.setattr(predict_nice, "FOLDER", tmp_path / "out")
    flags = ("--checkpoint", checkpoint, "--prompt", "", "--decoder", "clipcap", "--beam_size", 1)

    def run(folder, *words, check=0):
        return run_script("predict_nice.py", "--images", folder, *flags, "--ofile", "d", *words, check=check)

    return run


def rows(tmp_path):
    """Return the ids of both files, after checking that they are the same."""
    ids = list(json.loads((tmp_path / "out" / "d.json").read_text()))
    table = (tmp_path / "out" / "d.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["public_id", *ids]
    return ids


def test_ids_are_not_file_names(nice, tmp_path):
    """Read back they are as they were written, and numbers are numbers."""
    folder = pictures(tmp_path / "p", "v1.2.jpg", "v1.3.jpg", "at 10.15.30.jpg", "0012.jpg", b"caf\xe9.jpg", " x.jpg")
    nice(folder)
    assert rows(tmp_path) == ["12", "at 10.15.30", "caf\\xe9", "v1.2", "v1.3", "x"]
    pictures(folder, "new.jpg")
    assert "6 of 7 images are captioned" in nice(folder).stderr
    assert rows(tmp_path) == ["12", "at 10.15.30", "caf\\xe9", "new", "v1.2", "v1.3", "x"]


def test_nice_refuses_images_of_one_id(nice, tmp_path):
    folder = pictures(tmp_path / "p", "1.jpg", "1.png", "01.jpg", "2.jpg")
    one_line_error(nice(folder, check=2), "share a public_id", "1.jpg", "1.png", "01.jpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("d.json", "d.csv", "d.CSV", "v1.2.json"))
def test_nice_takes_an_ending_off(nice, tmp_path, name):
    done = nice(pictures(tmp_path / "p", "a.jpg"), "--ofile", name)
    stem = name.rsplit(".", 1)[0]
    assert sorted(os.listdir(tmp_path / "out")) == [f".{stem}.made_by.json", f"{stem}.csv", f"{stem}.json"]
    assert f"{stem}.json and {stem}.csv: 1 captions" in done.stderr


def test_nice_mixes_no_captioners(nice, tmp_path, checkpoint):
    """What another checkpoint, or another way of decoding, has captioned is not gone on with, finished or not."""
    folder, out = pictures(tmp_path / "p", "a.jpg", "b.jpg"), tmp_path / "out" / "d.json"
    nice(folder)
    before = out.read_bytes()
    shutil.copytree(checkpoint.parent, tmp_path / "other")
    other = tmp_path / "other" / checkpoint.name
    assert "2 of 2 images are captioned" in nice(folder, "--checkpoint", other).stderr  # the same by another path
    state = torch.load(other, weights_only=True)
    state["clip_project.model.0.bias"] += 1
    torch.save(state, other)
    for names in ((), ("c.jpg",)):  # finished, and with one to do
        pictures(folder, *names)
        one_line_error(nice(folder, "--checkpoint", other, check=2), "d.json", "another captioner", "--ofile")
        for flags in (("--beam_size", 2), ("--entry_length", 3), ("--dtype", "bf16"), ("--top_p", 0.5)):
            one_line_error(nice(folder, *flags, check=2), "d.json", "another way of decoding", "--ofile")
        assert out.read_bytes() == before
    assert "2 of 3 images are captioned" in nice(folder).stderr
    (tmp_path / "out" / ".d.made_by.json").unlink()
    assert "does not say which captioner" in nice(folder).stderr


def test_nice_tells_published_captioners_apart(tmp_path, monkeypatch):
    """Also where folders are called as they are."""
    monkeypatch.chdir(tmp_path)
    made = []
    for name in ("coco", "conceptual", "conceptual-captions"):
        (tmp_path / name).mkdir()
        args = predict_nice.get_parser().parse_args(["--checkpoint", name])
        made.append(predict_nice.made_by(args, args.decoding))
    assert made[0] != made[1] == made[2]


def test_nice_takes_pictures_only(nice, tmp_path):
    folder = pictures(tmp_path / "p", "beach.jpg")
    (folder / "._beach.jpg").write_bytes(b"\0\5\16\7\0\2\0\0Mac OS X" + bytes(90))
    (folder / "notes.txt").write_text("notes")
    assert "1 file of other kinds (notes.txt)" in nice(folder).stderr
    assert rows(tmp_path) == ["beach"]


def test_nice_table_follows_the_json(nice, tmp_path):
    """Killed between the two files, the next run makes them equal again."""
    folder = pictures(tmp_path / "p", "a.jpg", "b.jpg")
    nice(folder)
    (tmp_path / "out" / "d.csv").write_text("public_id,caption\na,x\n")
    nice(folder)
    assert rows(tmp_path) == ["a", "b"]


def test_nice_overwrites_nothing_of_others(nice, tmp_path, checkpoint, monkeypatch):
    folder, out = pictures(tmp_path / "p", "a.jpg"), tmp_path / "out"
    out.mkdir()
    (out / "d.csv").write_text("public_id,caption\na,mine\n")
    one_line_error(nice(folder, check=2), "d.csv is not of an earlier run")
    (out / "d.json").write_text('{"a": "mine"}')
    (out / "d.csv").write_text("name,price\n")
    one_line_error(nice(folder, check=2), "d.csv is not of an earlier run")
    (out / "d.json").write_text("[]")
    (out / "d.csv").unlink()
    one_line_error(nice(folder, check=2), "d.json is not {public_id: caption}")
    for name in ("../x", "a/b", "..", "", "."):
        one_line_error(nice(folder, "--ofile", name, check=2), "--ofile")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p"] and os.listdir(out) == ["d.json"]
    (out / "d.json").unlink()
    with lock(out / "d.json"):
        one_line_error(nice(folder, check=2), "another run is writing", "--ofile")
    shutil.copytree(checkpoint.parent, tmp_path / "run")
    monkeypatch.setattr(predict_nice, "FOLDER", tmp_path / "run")
    done = nice(folder, "--ofile", "run", "--checkpoint", tmp_path / "run" / "run_latest.pt", check=2)
    one_line_error(done, "would overwrite the captioner")
