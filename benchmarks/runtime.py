"""The runtime without torch beside ours in int8, and what it costs to install, to start and to keep in memory."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import workload
from benchmarks.measure import interleave
from models.captioner import Captioner
from models.exported import runtime

ROOT = Path(__file__).resolve().parent.parent
AIMS = {"MB installed": 150, "s of import": 0.5, "s of --help": None, "MB of memory at most": 600}
IMAGES = 8
# captions photos one by one and prints its peak memory in kB
PEAK = """
import sys, clipcap_runtime
captioner = clipcap_runtime.Captioner(sys.argv[1], int(sys.argv[2]))
for path in sys.argv[3:]:
    captioner.caption(path)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(lines["VmHWM"].split()[0])
"""


def install(folder):
    """Make an environment with the runtime and what it needs, nothing else; returns (its Python, MB installed)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    source = shutil.copytree(ROOT / "runtime", folder / "runtime")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", source], check=True)
    files = [file for file in (folder / "env" / "lib").rglob("*") if file.is_file() and not file.is_symlink()]
    return python, sum(file.stat().st_blocks * 512 for file in files) / 1e6


def seconds_of(command, repeats):
    """Return the median time of a command, after one run that fills the system's cache."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_package(folder, exported, photos, repeats):
    """Return rows of what the package costs, by itself and beside its aims."""
    python, size = install(folder)
    threads = str(torch.get_num_threads())
    peak = subprocess.run([python, "-c", PEAK, exported, threads, *photos], check=True, capture_output=True, text=True)
    found = {
        "MB installed": size,
        "s of import": seconds_of([python, "-c", "import clipcap_runtime"], repeats),
        "s of --help": seconds_of([python.parent / "clipcap", "--help"], repeats),
        "MB of memory at most": int(peak.stdout) * 1024 / 1e6,
    }
    return [{"figure": name, "measured": value, "at most": AIMS[name]} for name, value in found.items()]


def measure_captions(checkpoint, exported, photos, repeats):
    """Return rows of the time per caption, one image at a time, in turn with ours in int8."""
    ours = Captioner(checkpoint, device="cpu", dtype="int8")
    theirs = runtime().Captioner(exported, torch.get_num_threads())
    embeddings = torch.randn(IMAGES, 512, generator=torch.Generator().manual_seed(0))
    work = {
        ("torch int8", "embeddings"): lambda: [
            ours.caption_embeddings(row[None], workload.DECODING)[0][0] for row in embeddings
        ],
        ("runtime int8", "embeddings"): lambda: [
            theirs.caption_embeddings(row[None].numpy())[0][0] for row in embeddings
        ],
        ("torch int8", "pictures"): lambda: [
            found[path][0] for path in photos for found, _ in ours.caption_files([path], workload.DECODING)
        ],
        ("runtime int8", "pictures"): lambda: [theirs.captions([path])[0][0] for path in photos],
    }
    timed = interleave(work, repeats, torch.device("cpu"))
    seconds = timed.seconds
    assert all(
        len(found.tokens) == workload.DECODING.entry_length for group in timed.results.values() for found in group
    )
    return [
        {"system": system, "from": source, "tokens": workload.DECODING.entry_length, "ms/caption": took / IMAGES * 1e3,
         "x torch": took / seconds["torch int8", source]} | timed.quality((system, source))
        for (system, source), took in seconds.items()
    ]  # fmt: skip


def run(device, repeats, quick):
    """Measure the package and its captions, on the processor; returns {title: rows}."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkpoint, exported = workload.write_captioner(folder), folder / "exported"
        (folder / "photos").mkdir()
        photos = workload.write_photos(folder / "photos", IMAGES)
        words = ("--checkpoint", checkpoint, "--out", exported, "--dtype", "int8", "--check", photos[0])
        subprocess.run([sys.executable, "export.py", *words], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        return {
            "package": measure_package(folder, exported, photos, repeats),
            "captions": measure_captions(checkpoint, exported, photos, repeats),
        }
