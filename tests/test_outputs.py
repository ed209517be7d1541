"""Outputs are checked before any work, and held by one run at a time."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

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
