"""Time to the first training step, memory and shuffled reads, as the captions grow to a million."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.workload import caption_lengths
from features.shards import read_shards, write_shard
from features.store_files import info_path
from models.language import load_tokenizer
from utils.files import write_json

WIDTH = 512
SHARD = 1 << 17
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "weights" / "gpt2"
READS = 20_000


class MadeRows:
    """Rows of random numbers, made when they are asked for."""

    def __init__(self, count, shape):
        self.shape = (count, *shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        """Return a slice [n, *shape]."""
        return torch.randn(len(range(self.shape[0])[part]), *self.shape[1:])


def write_store(folder, count, shape=(WIDTH,)):
    """Write shards of random embeddings with captions as long as COCO's: words that are one token each."""
    tokenizer, rng = load_tokenizer(str(MODEL)), np.random.default_rng(0)
    words = [w for i in range(len(tokenizer)) if (w := tokenizer.decode([i])).startswith(" ") and w[1:].isalpha()]
    lengths = caption_lengths(count)
    for number, start in enumerate(range(0, count, SHARD)):
        own = lengths[start : start + SHARD]
        picks = iter(rng.integers(0, len(words), own.sum()).tolist())
        images = {
            f"{start + i}.jpg": [{"image_id": start + i, "caption": "".join(words[next(picks)] for _ in range(length))}]
            for i, length in enumerate(own.tolist())
        }
        write_shard(folder, number, "made", MadeRows(len(own), shape), images, {})
    info = {"clip_model_type": "made", "embed_dim": shape[-1]} | ({"tokens": "patches"} if len(shape) == 2 else {})
    write_json(info_path(folder), info | {"shards": -(-count // SHARD)})


def first_step(data, out):
    """Run train.py until it has taken steps.

    Returns: (seconds to the first step, MiB of the process' resident memory after 200 steps, steps/s after the first).
    """
    command = [
        sys.executable, "train.py", "--data", str(data), "--out_dir", str(out), "--language_model", str(MODEL),
        "--bs", "40", "--device", "cpu", "--epochs", "10",
    ]  # fmt: skip
    log, began = out / "coco_prefix-log.jsonl", time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        first = wait_for_lines(log, 1, process) - began
        then = time.perf_counter()
        wait_for_lines(log, 201, process)
        rate = 200 / (time.perf_counter() - then)
        resident = psutil.Process(process.pid).memory_info().rss / (1 << 20)
    finally:
        process.kill()
        process.wait()
    return first, resident, rate


def wait_for_lines(log, count, process):
    """Wait until a log has so many lines; returns the time."""
    while not (log.is_file() and log.read_bytes().count(b"\n") >= count):
        if process.poll() is not None:
            raise RuntimeError(f"train.py ended with {process.returncode} before step {count}")
        time.sleep(0.02)
    return time.perf_counter()


def run(device, repeats, quick):
    """Measure stores of a thousand to a million captions; returns {title: rows}."""
    rows = []
    for count in (1000, 2000) if quick else (1000, 10_000, 100_000, 1_000_000):
        folder = Path(tempfile.mkdtemp())
        try:
            write_store(folder / "store", count)
            seconds, resident, rate = first_step(folder / "store", folder / "run")
            embeddings, _ = read_shards(folder / "store")
            order = np.random.default_rng(0).integers(0, count, (READS // 40, 40))
            began = time.perf_counter()
            for indices in order:
                embeddings[indices]
            reads = READS / (time.perf_counter() - began)
        finally:
            shutil.rmtree(folder)
        rows.append({
            "captions": count, "s to the first step": seconds, "MiB resident": resident, "rows read/s": reads,
            "rows a step of 40 needs/s": rate * 40,
        })  # fmt: skip
    return {"start, memory and shuffled reads": rows}
