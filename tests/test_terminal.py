"""How commands behave at a terminal: progress, --quiet, NO_COLOR, help, Ctrl-C before anything has begun."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, run_process, run_script, slow_but

SCRIPTS = ("parse_coco", "train", "train_OPT", "predict", "predict_OPT", "predict_nice", "evaluate")
DEMO = ("predict.py", "demo/images", "--checkpoint", "demo", "--batch_size", "2")


def at_terminal(*words, **environment):
    """Run a command whose standard error is a terminal; return (its standard output, what the terminal got)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a new one is 0 columns wide
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(theirs)
    out, shown = process.communicate()[0].decode(), b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.returncode == 0, shown
    return out, shown.decode()


@pytest.mark.slow
def test_progress_on_a_terminal_only():
    """A bar with rate and time left, without colours; the same results without it; nothing where nobody looks."""
    out, shown = at_terminal(*DEMO, NO_COLOR="1")
    assert "images: 100%" in shown and "11/11" in shown and "img" in shown and "<00:00" in shown
    assert "\x1b[3" not in shown and "\x1b[9" not in shown and "\x1b[" not in out
    quiet, nothing = at_terminal(*DEMO, "--quiet")
    assert nothing == "" and quiet == out
    piped = run_process(*DEMO)
    assert piped.stderr == "" and piped.stdout == out


def test_quiet_keeps_results_and_errors(trained, photos, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    done = run_script("predict.py", tmp_path, photos, "--checkpoint", trained / "run_latest.pt", "--quiet", check=2)
    assert done.stdout.count("\t") == 12
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["skipped", "error:"]
    assert "none.pkl" in run_script("train.py", "--data", "none.pkl", "--quiet", check=2).stderr


def test_quiet_training(store, language_model, tmp_path):
    words = ("train.py", "--data", store, "--language_model", language_model, "--epochs", 1)
    quiet = run_script(*words, "--out_dir", tmp_path / "quiet", "--quiet").stderr.splitlines()
    loud = run_script(*words, "--out_dir", tmp_path / "loud").stderr.splitlines()
    assert quiet == [line for line in loud if line.startswith("warning")] != loud


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_says_units(script):
    text = run_script(f"{script}.py", "--help").stdout
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert len(groups) >= 3 and "--quiet" in text and "(default: )" not in text and "None)" not in text
    # every flag says something, beside it or on the line below
    assert not re.search(r"^  (--\w+)\n(?! {10})", text, re.MULTILINE)


COMPLETE = {  # words that are right, so that what does the work is imported
    "parse_coco": "--no_captions --images {root}/demo/images --out {here}/store.pkl",
    "train": "--data {root}/README.md --out_dir {here}/run",
    "train_OPT": "--data {root}/README.md --out_dir {here}/run",
    "predict": "{root}/demo/images --checkpoint demo",
    "predict_OPT": "{root}/demo/images --checkpoint demo",
    "predict_nice": "--images {root}/demo/images --checkpoint demo",
    "evaluate": "{here}/captions.csv {here}/captions.csv",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stop", (signal.SIGINT, signal.SIGTERM))
def test_interrupted_while_importing(script, stop, tmp_path):
    """Ctrl-C in the seconds that imports take ends the command without a word."""
    (tmp_path / "captions.csv").write_text("image,caption\n1.jpg,a dog\n2.jpg,a cat\n")
    # short sleeps: a signal just before a sleep begins is only noticed when the sleep is over
    importing = "import time\nprint('importing', flush=True)\nfor _ in range(600):\n    time.sleep(0.1)\n"
    for module in ("numpy", "torch"):  # whichever comes first
        (tmp_path / f"{module}.py").write_text(importing)
    words = COMPLETE[script].format(root=ROOT, here=tmp_path).split()
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *words], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(stop)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 128 + stop


WORDS = {
    "predict": ("demo/images", "--checkpoint", "demo", "--num_workers", "0"),
    "parse_coco": ("--check", "--annotations", "{}/captions.csv", "--images", "{}", "--num_workers", "0"),
    "evaluate": ("{}/captions.csv", "{}/captions.csv", "--metrics", "ROUGE_L", "--tokenizer", "python"),
}  # fmt: skip


@pytest.mark.parametrize("script", slow_but(WORDS, "parse_coco"))
def test_nobody_reads_the_output(script, tmp_path):
    """As after `| head -1`: the command ends with 141, without a word of it."""
    rows = "".join(f"none{n}.jpg,a caption\n" for n in range(3))
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, f"{script}.py", *(word.format(tmp_path) for word in WORDS[script])], cwd=ROOT,
        stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 141, done.stderr
    assert not [line for line in done.stderr.splitlines() if "faults" not in line and not line.startswith("warning")]
