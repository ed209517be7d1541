"""The log of a training run: a json line per optimiser step, and the picture of the loss."""

import json
from pathlib import Path

import matplotlib
import numpy as np

from utils.files import atomic_path

SMOOTHING = 100  # steps of the running mean in the picture


class TrainingLog:
    """Appends `{step, epoch, loss, lr, examples_per_s}` lines; a resumed run cuts what came after its last save."""

    def __init__(self, path, step=0):
        """Open the log after `step` steps.

        Args:
            path: `.jsonl` file.
            step: last step that counts; later lines were of steps that will be taken again.
        """
        self.path, self.entries = Path(path), []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        good_bytes = 0
        with open(self.path, "ab+") as file:
            file.seek(0)
            for line in file:
                if len(self.entries) == step or not line.endswith(b"\n"):
                    break
                self.entries.append(json.loads(line))
                good_bytes += len(line)
            file.truncate(good_bytes)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    @property
    def last_loss(self):
        """Loss of the newest step."""
        return self.entries[-1]["loss"]

    def add(self, step, epoch, loss, lr, examples_per_s):
        """Write one step's line."""
        entry = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "examples_per_s": round(examples_per_s, 1)}
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")

    def flush(self):
        """Hand all lines to the disk."""
        self.file.flush()

    def mean_loss(self, epoch):
        """Return the mean loss over an epoch's steps."""
        return float(np.mean([entry["loss"] for entry in self.entries if entry["epoch"] == epoch]))

    def plot(self, path):
        """Draw loss over steps, as it is and smoothed, with epochs marked."""
        matplotlib.use("Agg")
        from matplotlib import pyplot

        steps = np.array([entry["step"] for entry in self.entries])
        losses = np.array([entry["loss"] for entry in self.entries])
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
        width = min(SMOOTHING, max(1, len(losses) // 10))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"mean of {width}")
        for previous, entry in zip(self.entries, self.entries[1:], strict=False):
            if entry["epoch"] != previous["epoch"]:
                axes.axvline(entry["step"], color="0.9", linewidth=0.8, zorder=0)
        axes.set(xlabel="optimiser step", ylabel="cross-entropy per caption token (nats)")
        axes.set_title(self.path.name.removesuffix("-log.jsonl"))
        axes.legend(frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)
