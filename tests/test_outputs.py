"""Outputs are checked before any work, and held by one run at a time."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from PIL import Image
from test_evaluate import coco_file, result_file, save

import evaluate
from utils.outputs import check_output, lock

HOLD = """import sys, time
from utils.outputs import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    """Return a process that holds `path`, once it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def alias(path, how, monkeypatch):
    """Return another name of the same file or folder: relative, or through a link to its folder."""
    if how == "relative":
        monkeypatch.chdir(path.parent)
        return path.name
    if how == "link":
        link = path.parent.with_name(f"{path.parent.name}-link")
        link.symlink_to(path.parent)
        return link / path.name
    return path


@pytest.mark.parametrize("how", ("plain", "relative", "link"))
def test_lock_knows_the_same_file_by_other_names(tmp_path, monkeypatch, how):
    other = alias(tmp_path / "x.pkl", how, monkeypatch)
    with lock(tmp_path / "x.pkl"), pytest.raises(ValueError, match="another run is writing"), lock(other):
        pass
    assert not (tmp_path / ".x.pkl.lock").exists()


def test_lock_of_a_linked_folder(tmp_path):
    """A store's folder may be a link itself."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with lock(f"{tmp_path}/link/"), pytest.raises(ValueError, match="another run"), lock(tmp_path / "real"):
        pass


def test_lock_refuses_another_process_and_survives_a_kill(tmp_path):
    out = tmp_path / "new" / "store.pkl"
    other = hold(out)
    said = rf"another run is writing {out} \(process {other.pid} on .*name another --out"
    with pytest.raises(ValueError, match=said), lock(out):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock(out):
        assert os.listdir(out.parent) == [".store.pkl.lock"]
    assert os.listdir(out.parent) == []


def test_lock_refuses_a_second_run_in_the_same_process(tmp_path):
    with lock(tmp_path / "x"), pytest.raises(ValueError, match="another run is writing"), lock(tmp_path / "." / "x"):
        pass
    with lock(tmp_path / "x"):
        pass


def test_outputs_that_would_overwrite_an_input(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    os.symlink(tmp_path / "a.json", tmp_path / "link.json")
    for out in (tmp_path / "a.json", tmp_path / "x" / ".." / "a.json", tmp_path / "link.json"):
        with pytest.raises(ValueError, match="--out .* would overwrite the annotations, .*name another"):
            check_output("--out", out, {"the annotations": [None, tmp_path / "a.json"]})
    check_output("--out", tmp_path / "b.json", {"the annotations": tmp_path / "a.json"})


@pytest.mark.parametrize("keys", (("model", "training"), ("clip_model_type", "embed_dim")))
def test_outputs_that_belong_to_something_else(tmp_path, keys):
    (tmp_path / "x.json").write_text(json.dumps(dict.fromkeys(keys, 1)))
    with pytest.raises(ValueError, match="x.json would overwrite the json of a .*name another file"):
        check_output("--out", tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    check_output("--out", tmp_path / "x.json")


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out, said in (
        (tmp_path, "is a folder; name a file in it"),
        (f"{tmp_path}/new/", "is a folder; name a file in it"),
        (tmp_path / "file" / "x.json", "is no folder"),
        (tmp_path / "x.txt", "must end in .json or .csv"),
    ):
        with pytest.raises(ValueError, match=said):
            check_output("--out", out, endings=(".json", ".csv"))


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_outputs_of_an_evaluation(tmp_path, monkeypatch):
    """Refused before anything is read; what is there stays as it is."""
    monkeypatch.setattr(evaluate, "read_inputs", lambda *_: pytest.fail("files were read"))
    result_file(tmp_path / "c.json")
    coco_file(tmp_path / "r.json")
    save(tmp_path / "page.html", "references by a strange name")
    save(tmp_path / "run.json", {"model": {}, "training": {}})
    save(tmp_path / "store.json", {"clip_model_type": "ViT-B/32", "embed_dim": 512})
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    os.symlink(tmp_path / "r.json", tmp_path / "link.json")
    (tmp_path / "folder.json").mkdir()
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    for words, said in (
        (("--out", "r.json"), "--out r.json would overwrite the references"),
        (("--out", f"{tmp_path}/../{tmp_path.name}/c.json"), "would overwrite the captions"),
        (("--out", "link.json"), "would overwrite the references"),
        (("--out", "run.json"), "would overwrite the json of a training run"),
        (("--out", "store.json"), "would overwrite the json of a feature store"),
        (("--html", "r.json"), "--html r.json must end in .html or .htm"),
        (("--html", "1.jpg", "--images", tmp_path), "must end in .html or .htm"),
        (("--out", "1.jpg", "--html", "p.html", "--images", tmp_path), "--out 1.jpg must end in .json"),
        (("--out", "s.csv"), "must end in .json"),
        (("--out", "folder.json"), "is a folder; name a file in it"),
        (("--out", "new/"), "is a folder; name a file in it"),
        (("--out", "1.jpg/s.json"), "is no folder"),
        (("--compare", "b.json", "--out", "b.json"), "would overwrite the captions of --compare"),
        (("--train_captions", "t.json", "--out", "t.json"), "would overwrite the training captions"),
    ):
        done = run_script("evaluate.py", "c.json", "r.json", *words, check=2)
        assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert before == files_in(tmp_path)
    done = run_script("evaluate.py", "c.json", "page.html", "--html", "page.html", check=2)
    assert "would overwrite the references" in done.stderr
