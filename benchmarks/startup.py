"""How long commands take to begin, each a process of its own: help, a wrong flag, one picture to its caption."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import workload
from benchmarks.measure import interleave

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "parse_coco", "parse_conceptual", "train", "train_OPT", "train_scst", "predict", "predict_OPT", "predict_nice",
    "evaluate", "export", "app",
)  # fmt: skip
BARE = {"python -c pass": "pass", "import torch, transformers": "import torch, transformers"}
ONE_PICTURE = ("predict.py", "demo/images/200003.jpg", "--checkpoint", "demo")
REFUSED = 2  # exit status
LOAD = "import sys, torch, transformers; torch.load(sys.argv[1], mmap=True, weights_only=True)"  # it maps the file


# a small process in between, because Linux counts a parent's resident memory in its child's peak
WATCH = """
import os, sys
process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
print("\\n", os.wait4(process, 0)[2].ru_maxrss / 1024)
"""


def start(words, status=0):
    """Run Python to its end; raises RuntimeError where its exit status is not `status`."""
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True).returncode
    if ended != status:
        raise RuntimeError(f"python {' '.join(words)} ended with {ended}, not {status}")


def resident(words):
    """Run Python to its end; returns its peak resident memory in MiB."""
    done = subprocess.run([sys.executable, "-c", WATCH, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run(device, repeats, quick):
    """Measure every command; returns {title: rows}."""
    commands = COMMANDS[2:3] if quick else COMMANDS
    whole = {name: ("-c", code) for name, code in BARE.items()}
    whole["predict.py, one picture"] = (*ONE_PICTURE, "--device", str(device))
    work = {name: functools.partial(start, words) for name, words in whole.items()}
    for name in commands:
        work[name, "help"] = functools.partial(start, (f"{name}.py", "--help"))
        work[name, "refusal"] = functools.partial(start, (f"{name}.py", "--batch_sise", "4"), REFUSED)
    seconds = interleave(work, repeats, device).seconds
    rows = [
        {"command": name, "--help, s": seconds[name, "help"], "a wrong flag, s": seconds[name, "refusal"],
         "MiB": resident((f"{name}.py", "--help"))} for name in commands
    ]  # fmt: skip
    imports = seconds["import torch, transformers"]
    pictures = [
        {"process": name, "s": seconds[name], "x import": seconds[name] / imports, "MiB": resident(words)}
        for name, words in whole.items()
    ]
    return {
        "help and refusals": rows,
        "one picture": pictures,
        "one picture, GPT-2 124M and ViT-B/32": full_size(device, repeats),
    }


def full_size(device, repeats):
    """Return rows of a captioner of full size: its weights mapped by torch alone, and one picture captioned."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = workload.write_captioner(Path(folder))
        words = ("predict.py", ONE_PICTURE[1], "--checkpoint", checkpoint, "--device", device)
        whole = {
            "import torch, transformers; torch.load": ("-c", LOAD, str(checkpoint)),
            "predict.py, one picture": tuple(map(str, words)),
        }
        timed = interleave({name: functools.partial(start, words) for name, words in whole.items()}, repeats, device)
        bare = timed.seconds["import torch, transformers; torch.load"]
        return [
            {"process": name, "s": timed.seconds[name], "x load": timed.seconds[name] / bare, "MiB": resident(words)}
            | timed.quality(name) for name, words in whole.items()
        ]  # fmt: skip
