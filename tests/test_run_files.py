"""A training run's files: whose they are, what is kept when it stops, and what it may be resumed with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, read_log, train, train_command
from test_outputs import alias
from test_scripts import equal, one_line_error, weights

from features.store import read_store, write_store
from training.trainer import Trainer
from utils.outputs import lock


@pytest.fixture
def own_store(store, tmp_path):
    """A copy of the store, in data/x.pkl."""
    folder = tmp_path / "data"
    folder.mkdir()
    for ending in (".pkl", ".json"):
        shutil.copy(store.with_suffix(ending), folder / f"x{ending}")
    return folder / "x.pkl"


def same_losses(folder, other):
    keys = ("step", "epoch", "loss", "lr")
    assert [[line[key] for key in keys] for line in read_log(folder)] == [
        [line[key] for key in keys] for line in read_log(other)
    ]


# ---- whose they are


@pytest.mark.parametrize("how", ("plain", "relative", "link"))
def test_second_run_on_the_same_files(store, language_model, tmp_path, monkeypatch, how):
    out = tmp_path / "new" / "run"
    out.mkdir(parents=True)
    with lock(out / "run.json"):
        done = train(store, language_model, alias(out, how, monkeypatch), check=2)
        one_line_error(done, "another run is writing", "run.json", "another --prefix or --out_dir")
        assert os.listdir(out) == [".run.json.lock"]
    assert os.listdir(out) == []


def test_json_of_the_store_is_not_the_runs(own_store, language_model, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(own_store.parent)
    before = own_store.with_suffix(".json").read_bytes()
    for out in (own_store.parent, tmp_path / "link"):
        done = train(own_store, language_model, out, "--prefix", "x", check=2)
        one_line_error(done, "--prefix x would overwrite the json of --data's store", "x.json; pass another")
    shutil.copy(own_store, tmp_path / "data" / "y.pkl")
    done = train(tmp_path / "data" / "y.pkl", language_model, own_store.parent, "--prefix", "x", check=2)
    one_line_error(done, "x.json, which is not the json of a run")
    done = train(
        own_store, language_model, tmp_path, "--val_data", tmp_path / "v.pkl", "--prefix", "v", check=2
    )  # refused though there is no such json yet
    one_line_error(done, "the json of --val_data's store")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(own_store.parent, "shards")
    one_line_error(train("shards", language_model, ".", "--prefix", "shards", check=2), "the json of --data's store")
    assert before == own_store.with_suffix(".json").read_bytes() and sorted(os.listdir()) == ["data", "link", "shards"]


def test_places_that_cannot_be_written(store, language_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        one_line_error(train(store, language_model, out, check=2), "--out_dir", "is no folder")
    one_line_error(train(store, language_model, tmp_path, "--prefix", "a/b", check=2), "--prefix 'a/b' is no name")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_checkpoints_without_a_json_are_moved_aside(store, language_model, tmp_path):
    """As a predecessor's run, which has none."""
    for name in ("run-000.pt", "run_latest.pt"):
        (tmp_path / name).write_text("a predecessor's")
    train(store, language_model, tmp_path, "--epochs", 1)
    for name in ("run-000.pt", "run_latest.pt"):
        assert (tmp_path / "run-previous" / name).read_text() == "a predecessor's"


# ---- what is kept


def at_step(monkeypatch, step, act):
    """Call `act` before the step of that number, counted from 1, is taken."""
    plain = Trainer.train_step

    def take(self, batches):
        if self.step + 1 == step:
            act()
        return plain(self, batches)

    monkeypatch.setattr(Trainer, "train_step", take)


def fail():
    raise RuntimeError("from the driver")


@pytest.mark.parametrize(
    "act, status",
    (
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
        (fail, None),
    ),
    ids=("SIGTERM", "SIGINT", "error"),
)
def test_what_is_trained_is_kept(store, language_model, trained, tmp_path, monkeypatch, act, status):
    with monkeypatch.context() as patch:
        at_step(patch, 4, act)
        if status is None:
            with pytest.raises(RuntimeError, match="from the driver"):
                train(store, language_model, tmp_path)
        else:
            done = train(store, language_model, tmp_path, check=status)
            assert "step 4 is saved; the same command with --resume goes on" in done.stderr
            assert done.stderr.splitlines()[-1].startswith("terminated" if status == 143 else "interrupted")
    assert (
        torch.load(tmp_path / "run_state.pt", weights_only=True)["step"] == len(read_log(tmp_path)) == 4 - (not status)
    )
    train(store, language_model, tmp_path, "--resume")
    assert equal(weights(tmp_path), weights(trained))
    same_losses(tmp_path, trained)


def test_diverged_weights_are_not_kept(store, language_model, tmp_path, monkeypatch):
    """The error names the last good ones."""
    at_step(monkeypatch, 8, lambda: (_ for _ in ()).throw(FloatingPointError("the loss is nan")))
    one_line_error(train(store, language_model, tmp_path, check=2), "the last good weights are", "run_latest.pt")
    assert torch.load(tmp_path / "run_state.pt", weights_only=True)["step"] == 6
    assert equal(weights(tmp_path), weights(tmp_path, "run-000.pt"))


@pytest.mark.slow
def test_sigterm_to_the_process(store, language_model, trained, tmp_path):
    words = [sys.executable, *train_command(store, language_model, tmp_path, "--save_steps", 1, "--epochs", 200)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run_state.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 143 and stderr.splitlines()[-1].startswith("terminated: step"), stderr


# ---- what it may be resumed with


def test_resume_compares_content(own_store, language_model, trained, tmp_path, monkeypatch):
    run, words = tmp_path / "run", ("--save_steps", 1)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(own_store, language_model, run, "--val_data", own_store, *words, check=143)
    changed = read_store(own_store)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "y.pkl"
    own_store.rename(moved)
    own_store.with_suffix(".json").rename(moved.with_suffix(".json"))
    state = (run / "run_state.pt").read_bytes()
    for change in ("caption", "embedding"):  # another content at the same path
        if change == "caption":
            changed.captions[5]["caption"] += " Or so."
        else:
            changed = read_store(moved)
            changed.clip_embedding[3, 1] += 1e-3
        write_store(own_store, changed.clip_embedding, changed.captions, changed.info)
        for data, val_data, flag in ((own_store, moved, "--data"), (moved, own_store, "--val_data")):
            done = train(data, language_model, run, "--val_data", val_data, *words, "--resume", check=2)
            one_line_error(done, f"{flag} {own_store} does not hold what the run was begun with")
    longer = train(moved, language_model, run, "--val_data", moved, *words, "--resume", "--epochs", 3, check=2)
    one_line_error(longer, "--epochs 2, not 3", f"--init_from {run / 'run_latest.pt'} and another --prefix")
    assert state == (run / "run_state.pt").read_bytes()
    done = train(moved, language_model, run, "--val_data", moved, *words, "--resume")
    assert "resuming run after step 3" in done.stderr
    assert [line["step"] for line in read_log(run) if "loss" in line] == list(range(1, 13))
    assert json.loads((run / "run.json").read_text())["contents"]["data"] == read_store(moved).fingerprint()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_fingerprint_of_any_numbers(own_store, dtype):
    """numpy does not know all of torch's."""
    store = read_store(own_store)
    half = replace(store, clip_embedding=store.clip_embedding.to(dtype))
    changed = replace(half, clip_embedding=half.clip_embedding * 2)
    assert len({one.fingerprint() for one in (store, half, changed)}) == 3
